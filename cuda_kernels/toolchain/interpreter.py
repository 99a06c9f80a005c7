"""NumPy-vectorised PTX interpreter: all threads of all blocks in lock step, min-PC reconvergence."""
import re, numpy as np
from cuda_kernels.toolchain.memory import DeviceMemory, DeviceMemoryError, OFFSET_BITS, OFFSET_MASK
DT={k+str(w):np.dtype({'u':'u','b':'u','s':'i','f':'f'}[k]+str(w//8)) for k in 'ubsf' for w in (8,16,32,64) if not(k=='f' and w==8)}
U={1:np.uint8,2:np.uint16,4:np.uint32,8:np.uint64}
GBASE,SBASE,LBASE=16<<40,1<<40,2<<40
CTRL={'bra','ret','exit','bar','barrier','shfl','vote','mma','ldmatrix','activemask','match','redux','trap'}
class PTXError(Exception): pass
class Ins: __slots__=('op','mods','args','pred','neg','fn','text')
def split_args(s):
    out=[];cur='';d=0
    for c in s:
        if c in '{[(': d+=1
        if c in '}])': d-=1
        if c==',' and d==0: out.append(cur.strip());cur=''
        else: cur+=c
    if cur.strip(): out.append(cur.strip())
    return out
class Kernel:
    def __init__(self,ptx):
        ptx=re.sub(r'//.*','',ptx); ptx=re.sub(r'/\*.*?\*/','',ptx,flags=re.S)
        self.gsyms={}; self.shared={}; self.local={}; self.shsize=0; self.lsize=0; self.ginit=[]
        m=re.search(r'\.entry\s+([\w$]+)\s*\((.*?)\)',ptx,re.S); self.name=m.group(1)
        head=ptx[:m.start()]
        for d in re.finditer(r'(\.(?:extern|visible|weak|common)\s+)?\.(global|shared|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[(\d*)\])?(?:\s*=\s*\{?([^;}]*)\}?)?;',head):
            sp,al,t,n,arr,cnt,init=d.group(2),int(d.group(3) or 1),d.group(4),d.group(5),d.group(6),d.group(7),d.group(8)
            size=DT[t].itemsize*(int(cnt) if cnt else (0 if arr else 1))
            if sp=='shared': self._alloc_sh(n,size,al)
            else: self.ginit.append((n,size,DT[t],init))
        self.params=[]
        for p in split_args(m.group(2)):
            q=re.match(r'\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr[^ ]*\s+(?:\.align\s+\d+\s+)?)?([\w$]+)(\[\d+\])?',p); self.params.append((q.group(2),q.group(1)))
        i=ptx.index('{',m.end()); depth=0
        for j in range(i,len(ptx)):
            if ptx[j]=='{': depth+=1
            elif ptx[j]=='}':
                depth-=1
                if depth==0: break
        self._body(ptx[i+1:j])
    def _alloc_sh(self,n,size,al): self.shsize=(self.shsize+al-1)//al*al; self.shared[n]=self.shsize; self.shsize+=size
    def _body(self,body):
        self.regs={}; self.code=[]; self.labels={}
        body=re.sub(r'^\s*[{}]\s*$','',body,flags=re.M)
        for st in body.split(';'):
            st=st.strip()
            while True:
                m=re.match(r'([$\w]+):\s*',st)
                if not m: break
                self.labels[m.group(1)]=len(self.code); st=st[m.end():]
            if not st: continue
            st=re.sub(r'^(?:[{}]\s*)+(?=[.a-z@$]|$)|(?<=\s)\}$','',st).strip()
            while True:
                m=re.match(r'([$\w]+):\s*',st)
                if not m: break
                self.labels[m.group(1)]=len(self.code); st=st[m.end():]
            if not st: continue
            if st.startswith('.reg'):
                m=re.match(r'\.reg\s+\.(\w+)\s+(.*)',st,re.S)
                for r in m.group(2).split(','):
                    r=r.strip(); q=re.match(r'(.*)<(\d+)>',r)
                    for nm in ([q.group(1)+str(k) for k in range(int(q.group(2)))] if q else [r]): self.regs[nm]=m.group(1)
            elif st.startswith(('.local','.shared')):
                m=re.match(r'\.(local|shared)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?',st); size=DT[m.group(3)].itemsize*int(m.group(5) or 1)
                if m.group(1)=='shared': self._alloc_sh(m.group(4),size,int(m.group(2) or 1))
                else: self.lsize=(self.lsize+15)//16*16; self.local[m.group(4)]=self.lsize; self.lsize+=size
            elif st.startswith(('.loc','.pragma','.file')): continue
            else:
                m=re.match(r'(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)',st,re.S); I=Ins(); I.text=st
                I.neg=m.group(1)=='!'; I.pred=m.group(2); p=m.group(3).replace('::','__').split('.'); I.op=p[0]; I.mods=p[1:]; I.args=split_args(m.group(4)); self.code.append(I)
        L=set(self.labels.values())
        for i,I in enumerate(self.code):
            if I.op in CTRL: L|={i,i+1}
        self.leader=[i in L for i in range(len(self.code)+1)]
        for I in self.code:
            I.fn=None if I.op in CTRL else getattr(Run,'i_'+I.op,None)
            if I.fn is None and I.op not in CTRL: raise PTXError('unsupported instruction: '+I.text)
    abi='numba'   # or 'mlir': numba-cuda-mlir passes memref descriptors (base, aligned, offset, sizes.., strides in elements..)
    def __call__(self,memory,grid,block,args,shmem=0,checks=True): return Run(self,memory,grid,block,args,shmem,checks).go()
class Run:
    def __init__(self,k,memory,grid,block,args,shmem,checks,b0=0,nb=None):
        self.b0=b0; self.nb1=nb if nb is not None else int(np.prod(grid))
        self.memory=memory
        self.k=k; d3=lambda t:((tuple(t) if hasattr(t,"__len__") else (t,))+(1,1))[:3]; self.grid,self.block=d3(grid),d3(block)
        nb=self.nb1; bt=int(np.prod(self.block)); P=(bt+31)//32*32; N=self.N=nb*P; self.P,self.nb=P,nb
        lin=np.arange(N); t=lin%P; b=lin//P; real=t<bt; u=lambda a:a.astype(np.uint32)
        S=self.S={}
        for nm,v,dim in(('tid',t,self.block),('ctaid',b+b0,self.grid)):
            S['%'+nm+'.x']=u(v%dim[0]);S['%'+nm+'.y']=u(v//dim[0]%dim[1]);S['%'+nm+'.z']=u(v//(dim[0]*dim[1]))
        for nm,dim in(('ntid',self.block),('nctaid',self.grid)):
            for c,v in zip('xyz',dim): S[f'%{nm}.{c}']=np.full(N,v,np.uint32)
        S['%laneid']=u(t%32); S['%warpid']=u(t//32); S['WARP_SZ']=np.full(N,32,np.uint32); S['%dynamic_smem_size']=np.full(N,shmem,np.uint32); S['%total_smem_size']=np.full(N,k.shsize+shmem,np.uint32); S['%nwarpid']=np.full(N,P//32,np.uint32); S['%clock64']=np.zeros(N,np.uint64)
        for nm,f in(('eq',lambda l:1<<l),('lt',lambda l:(1<<l)-1),('le',lambda l:(2<<l)-1),('gt',lambda l:~((2<<l)-1)),('ge',lambda l:~((1<<l)-1))): S[f'%lanemask_{nm}']=u(f(t.astype(np.int64)%32)&0xffffffff)
        self.blk=b; self.lane=t%32
        # memory
        self.shb=(k.shsize+shmem+15)//16*16; self.sh=np.full(max(nb*self.shb,16),255,np.uint8); self.lcb=(k.lsize+15)//16*16; self.lc=np.full(max(N*self.lcb,16),255,np.uint8)
        self.syms={}
        for n,size,dt,init in k.ginit:
            v=np.zeros(size//dt.itemsize,dt)
            if init: q=np.array([int(x,0) for x in init.split(',')],dtype=dt); v[:q.size]=q
            self.syms[n]=memory.upload(v,n)
        vals=list(args)
        assert len(vals)==len(k.params),(len(vals),len(k.params))
        self.pv={n:np.full(N,np.array(v).astype(DT[t]) if not isinstance(v,int) else np.array(v&(1<<8*DT[t].itemsize)-1,np.uint64).astype(U[DT[t].itemsize]).view(DT[t])).view(U[DT[t].itemsize]) for (n,t),v in zip(k.params,vals)}
        self.R={n:np.zeros(N,bool) if t=='pred' else np.zeros(N,U[DT[t].itemsize]) for n,t in k.regs.items()}
        self.cpq=[]; self.cpg=np.zeros(N,np.int64); self.race=checks; z=len(self.sh); self.wt=np.full(z,-1,np.int32); self.we=np.zeros(z,np.int64); self.ww=np.zeros(z,np.int64); self.rlo=np.full(z,2**31-1,np.int32); self.rhi=np.full(z,-1,np.int32); self.re=np.full(z,-1,np.int64); self.be=np.ones(nb,np.int64); self.wep=np.ones(N//32,np.int64)
        self.cc=np.zeros(N,bool); self.pc=np.zeros(N,np.int64); self.done=~real; self.wait=np.zeros(N,np.int8); self.steps=0; self.icount=0
    # operands
    def imm(self,o,d):
        if o.startswith('0f') or o.startswith('0F'): r=np.array(int(o[2:],16),np.uint32)
        elif o.startswith('0d') or o.startswith('0D'): r=np.array(int(o[2:],16),np.uint64)
        else: r=np.array(int(o.rstrip('U'),0)&((1<<8*d.itemsize)-1),np.uint64).astype(U[d.itemsize])
        return r.view(d)
    def raw(self,o,w):
        r=self.R.get(o)
        if r is None: r=self.S.get(o)
        if r is None:
            k=self.k
            if o in k.shared: return np.full(self.N,k.shared[o],U[w])
            if o in k.local: return np.full(self.N,k.local[o],U[w])
            if o in self.syms: return np.full(self.N,self.syms[o],U[w])
        return r
    def g(self,o,t):
        if t=='pred':
            return (~self.R[o[1:]] if o[0]=='!' else self.R[o]) if not o.lstrip('-').isdigit() else np.full(self.N,o!='0')
        d=DT[t]; r=self.raw(o,d.itemsize)
        if r is None: return self.imm(o,d)
        return r.view(d) if r.dtype.itemsize==d.itemsize else r.astype(U[d.itemsize]).view(d)
    def put(self,dst,v):
        if dst=='_': return
        R=self.R[dst]
        if R.dtype!=bool:
            v=np.asarray(v)
            if v.dtype.itemsize!=R.dtype.itemsize: v=v.astype(np.dtype(v.dtype.kind+str(R.dtype.itemsize)))
            v=np.ascontiguousarray(v).view(R.dtype) if v.ndim else v.reshape(1).view(R.dtype)
        if self.full: R[...]=v
        else: np.copyto(R,v,where=self.m)
    # main loop
    def go(self):
        code=self.k.code; n=len(code)
        with np.errstate(all='ignore'):
            while True:
                run=~self.done&(self.wait==0)
                if not run.any():
                    if self.done.all(): break
                    if not self.release(): raise PTXError('deadlock: barrier or warp op not reached by every thread; pcs '+str({code[p].text for p in set(self.pc[~self.done])}))
                    continue
                p=int(self.pc[run].min()); self.m=run&(self.pc==p); self.full=bool(self.m.all() or (self.m|self.done).all()); self.steps+=1
                while True:
                    if p>=n: self.done|=self.m; break
                    I=code[p]
                    if I.op in CTRL: self.ctrl(I,p); break
                    self.icount+=1
                    if I.pred:
                        sm,sf=self.m,self.full; c=self.R[I.pred]; self.m=sm&(~c if I.neg else c); self.full=False
                        if self.m.any(): I.fn(self,I)
                        self.m,self.full=sm,sf
                    else: I.fn(self,I)
                    p+=1
                    if self.k.leader[p]: self.pc[self.m]=p; break
        for p in self.syms.values(): self.memory.free(p)
        return self
    def ctrl(self,I,p):
        m=self.m
        if I.pred: c=self.R[I.pred]; t=m&(~c if I.neg else c)
        else: t=m
        if I.op=='bra': self.pc[m]=p+1; self.pc[t]=self.k.labels[I.args[0]]
        elif I.op in('ret','exit'): self.pc[m]=p+1; self.done|=t
        elif I.op in('bar','barrier') and 'warp' not in I.mods: self.pc[m]=p; self.wait[t]=1; self.pc[m&~t]=p+1
        elif I.op=='trap': raise PTXError('trap executed')
        else: self.pc[m]=p; self.wait[t]=2; self.pc[m&~t]=p+1; self.release_warp()
    def release(self):
        w=(self.wait==1); alive=~self.done; B=lambda a:a.reshape(self.nb,self.P)
        rel=(B(w)|B(self.done)).all(1)&B(w).any(1)
        if not rel.any(): return self.release_warp()
        pcs=np.where(w,self.pc,-1).reshape(self.nb,self.P)
        for b in np.nonzero(rel)[0]:
            s=set(pcs[b][pcs[b]>=0].tolist())
            if len(s)>1: raise PTXError(f'divergent bar.sync in block {b}: {[self.k.code[q].text for q in s]} at {s}')
        self.be[rel]+=1; s=np.repeat(rel,self.P)&w; self.wait[s]=0; self.pc[s]+=1
        return True
    def release_warp(self):
        got=False; W=lambda a:a.reshape(-1,32)
        for p in set(self.pc[self.wait==2].tolist()):
            I=self.k.code[p]; at=(self.wait==2)&(self.pc==p)
            o={'shfl':-1,'vote':-1,'bar':0,'match':-1,'redux':-1}.get(I.op)
            mm=self.g(I.args[o],'u32') if o is not None and I.op!='activemask' else None
            mask=np.broadcast_to(mm,(self.N,)) if mm is not None else np.full(self.N,0xffffffff if I.op in('mma','ldmatrix') else 0,np.uint32)
            bits=(W(at)*(np.uint64(1)<<np.arange(32,dtype=np.uint64))).sum(1,dtype=np.uint64); dn=(W(self.done)*(np.uint64(1)<<np.arange(32,dtype=np.uint64))).sum(1,dtype=np.uint64)
            need=np.repeat(bits|dn,32); okl=at&((mask.astype(np.uint64)&~need)==0)
            ready=np.repeat((W(okl)==W(at)).all(1),32)&at
            if ready.any():
                self.m=ready; self.full=False; self.act=np.repeat(bits,32); getattr(self,'w_'+I.op)(I); self.wait[ready]=0; self.pc[ready]+=1; got=True; self.wep[ready.reshape(-1,32).any(1)]+=1
        return got
    # warp ops
    def w_bar(self,I): pass
    def w_activemask(self,I): self.put(I.args[0],self.act.astype(np.uint32))
    def w_shfl(self,I):
        d,*_=I.args; mode=I.mods[1]; dst,_,pd=d.partition('|'); a=np.broadcast_to(self.g(I.args[1],'u32'),(self.N,)); b=np.broadcast_to(self.g(I.args[2],'u32'),(self.N,)).astype(np.int64)&31; c=np.broadcast_to(self.g(I.args[3],'u32'),(self.N,)).astype(np.int64)
        l=self.lane; cl=c&31; seg=(c>>8)&31; mx=(l&seg)|(cl&~seg); mn=l&seg
        if mode=='up': j=l-b; pv=j>=mx
        elif mode=='down': j=l+b; pv=j<=mx
        elif mode=='bfly': j=l^b; pv=j<=mx
        else: j=mn|(b&~seg); pv=j<=mx
        j=np.where(pv,j,l); src=np.arange(self.N)-l+j
        if (~self.m[src]&self.m).any(): raise PTXError('shfl reads an inactive lane: '+I.text)
        self.put(dst.strip(),a[src]); 
        if pd: self.put(pd.strip(),pv)
    def w_vote(self,I):
        p=self.g(I.args[1],'pred')&self.m; bits=(p.reshape(-1,32)*(np.uint64(1)<<np.arange(32,dtype=np.uint64))).sum(1,dtype=np.uint64); bits=np.repeat(bits,32); mk=np.broadcast_to(self.g(I.args[-1],'u32'),(self.N,)).astype(np.uint64); bits&=mk
        md=I.mods[1]; self.put(I.args[0],bits.astype(np.uint32) if md=='ballot' else (bits==mk if md=='all' else bits!=0))
    def _frag(self,o,t): return [np.broadcast_to(self.g(x.strip(),t),(self.N,)) for x in o.strip('{}').split(',')]
    def w_mma(self,I):
        shp=I.mods[2]; types=I.mods[-4:]; assert shp in('m16n8k16','m16n8k8') and types[0]=='f32',I.text; kk=int(shp[6:]) 
        cv=(lambda r:np.ascontiguousarray(r).view(np.float16).astype(np.float32)) if types[1]=='f16' else (lambda r:(np.ascontiguousarray(r).view(np.uint16).astype(np.uint32)<<16).view(np.float32))
        A=[cv(r).reshape(-1,32,2) for r in self._frag(I.args[1],'u32')]; B=[cv(r).reshape(-1,32,2) for r in self._frag(I.args[2],'u32')]; C=[r.reshape(-1,32) for r in self._frag(I.args[3],'f32')]
        nw=self.N//32; l=np.arange(32); g,t=l>>2,l&3; MA=np.zeros((nw,16,kk),np.float32); MB=np.zeros((nw,kk,8),np.float32); MC=np.zeros((nw,16,8),np.float32)
        for i in range(len(A)):
            for e in range(2): MA[:,g+8*(i&1),t*2+e+8*(i>>1)]=A[i][:,:,e]
        for i in range(4):
            MC[:,g+8*(i>>1),t*2+(i&1)]=C[i]
        for i in range(len(B)):
            for e in range(2): MB[:,t*2+e+8*i,g]=B[i][:,:,e]
        D=MA@MB+MC
        for i,r in enumerate(I.args[0].strip('{}').split(',')): self.put(r.strip(),np.ascontiguousarray(D[:,g+8*(i>>1),t*2+(i&1)]).reshape(-1))
    def w_ldmatrix(self,I):
        n=int([x for x in I.mods if x[0]=='x'][0][1:]); tr='trans' in I.mods; ad=self.addr(I.args[1],'shared').reshape(-1,32); l=np.arange(32); mm=self.m
        for q in range(8): self.m=mm&(np.arange(self.N)%32//8<n); self.chk(I,ad.reshape(-1)[self.m]+2*q,2,False)
        self.m=mm
        for i,r in enumerate(I.args[0].strip('{}').split(',')):
            if tr: rows=[ad[:,8*i+2*(l&3)+e]+2*(l>>2) for e in(0,1)]
            else: rows=[ad[:,8*i+(l>>2)]+4*(l&3)+2*e for e in(0,1)]
            lo,hi=[self.sh.view(np.uint16)[x//2].astype(np.uint32) for x in rows]; self.put(r.strip(),(lo|hi<<16).reshape(-1))
    # memory
    def addr(self,o,sp):
        o=o.strip('[]').strip(); m=re.match(r'(.+?)\s*\+\s*(-?\w+)$',o); base,off=(m.group(1).strip(),int(m.group(2),0)) if m else (o,0)
        r=self.raw(base,8); a=(np.full(self.N,int(base,0)) if r is None else r).astype(np.int64)+off
        if sp=='shared': return np.where((a>=SBASE)&(a<LBASE),a-SBASE,a)+self.blk*self.shb
        if sp=='local': return np.where((a>=LBASE)&(a<GBASE),a-LBASE,a)+np.arange(self.N)*self.lcb
        return a
    def space(self,I):
        for s in('global','shared','local','param','const'):
            if any(x.split('__')[0]==s for x in I.mods): return s
    def fail(self,bad,sp,I,why):
        i=np.nonzero(self.m)[0][np.nonzero(bad)[0][0]]; raise PTXError(f'{why} {sp} access by block {self.blk[i]+self.b0} thread {i%self.P}: {I.text}')
    def resolve(self,I,o,sz):
        sp=self.space(I)
        if sp is None:
            a=self.raw(re.split(r'[\[\]+]',o)[1].strip(),8).astype(np.int64)[self.m]
            sp='global' if (a>=GBASE).all() else 'local' if (a>=LBASE).all() else 'shared'
        a=self.addr(o,sp); am=a[self.m]
        if (am%sz).any(): self.fail(am%sz!=0,sp,I,'misaligned')
        if sp in('global','const'): return None,am
        if sp=='shared': buf=self.sh; rel=am-(self.blk*self.shb)[self.m]; bad=(rel<0)|(rel+sz>self.shb)
        else: buf=self.lc; rel=am-(np.arange(self.N)*self.lcb)[self.m]; bad=(rel<0)|(rel+sz>self.lcb)
        if bad.any(): self.fail(bad,sp,I,'out-of-bounds')
        return buf,am
    def parts(self,am,sz,I):
        """(allocation, lanes (or slice), offsets) of a global access"""
        nums=am>>OFFSET_BITS
        if not len(am): return
        groups=[(int(nums[0]),slice(None))] if (nums==nums[0]).all() else [(int(n),np.nonzero(nums==n)[0]) for n in np.unique(nums)]
        for n,w in groups:
            a=self.memory._allocations.get(n)
            off=am[w]&OFFSET_MASK
            if a is None or (off+sz>a.data.size).any():
                bad=np.zeros(len(am),bool); bad[w]=True if a is None else off+sz>a.data.size
                self.fail(bad,'global',I,'out-of-bounds' if a is None else f'out-of-bounds ({a.name}, {a.data.size} bytes, offset {int(off[off+sz>a.data.size][0])})')
            yield a,w,off
    def gload(self,am,d,n,I,sz):
        out=np.zeros((len(am),n),d)
        for a,w,off in self.parts(am,sz,I):
            if a.written is not None and self.race:
                for k in range(sz):
                    bad=~a.written[off+k]
                    if bad.any(): b=np.zeros(len(am),bool); b[w]=bad; self.fail(b,'global',I,f'never-written memory ({a.name}):')
            v=a.data[:a.data.size//d.itemsize*d.itemsize].view(d)
            for j in range(n): out[w,j]=v[off//d.itemsize+j]
        return out
    def gstore(self,am,vals,d,I,sz):
        for a,w,off in self.parts(am,sz,I):
            v=a.data[:a.data.size//d.itemsize*d.itemsize].view(d)
            for j,x in enumerate(vals): v[off//d.itemsize+j]=x[w]
            if a.written is not None:
                for k in range(sz): a.written[off+k]=True
    def chk(self,I,am,sz,write):
        # happens-before check on shared memory: bar.sync opens a new block epoch, any *.sync warp op a new warp epoch
        if not self.race: return
        ln=np.nonzero(self.m)[0]; b=self.blk[ln]; be=self.be[b]; w=ln//32; we=self.wep[w]
        for k in range(sz):
            a=am+k; t=self.wt[a]; bad=(t>=0)&(t!=ln)&(self.we[a]==be)&((t//32!=w)|(self.ww[a]==we))
            if write:
                r=(self.re[a]==be)&(((self.rlo[a]!=ln)&(self.rlo[a]//32!=w))|((self.rhi[a]!=ln)&(self.rhi[a]//32!=w))); bad|=r
            if bad.any():
                i=np.nonzero(bad)[0][0]; o=int(t[i]); raise PTXError(f'shared-memory race: {"write" if write else "read"} by block {b[i]} thread {ln[i]%self.P} of byte {int(a[i]-b[i]*self.shb)} with an unsynchronised access by thread {o%self.P if o>=0 else "?"}: {I.text}')
            if write: self.wt[a]=ln; self.we[a]=be; self.ww[a]=we
            else:
                old=self.re[a]!=be; self.rlo[a[old]]=2**31-1; self.rhi[a[old]]=-1; self.re[a]=be; np.minimum.at(self.rlo,a,ln.astype(np.int32)); np.maximum.at(self.rhi,a,ln.astype(np.int32))
    def vecn(self,I): return next((int(x[1]) for x in I.mods if x in('v2','v4')),1)
    def i_ld(self,I):
        t=I.mods[-1]; d=DT[t]; o=I.args[1]
        if 'param' in I.mods: self.put(I.args[0],self.pv[o.strip('[]')].view(d)); return
        n=self.vecn(I); buf,am=self.resolve(I,o,d.itemsize*n)
        if buf is None: got=self.gload(am,d,n,I,d.itemsize*n)
        else:
            if buf is self.sh: self.chk(I,am,d.itemsize*n,False)
            v=buf.view(d); got=np.stack([v[am//d.itemsize+j] for j in range(n)],1)
        for j,r in enumerate(I.args[0].strip('{}').split(',')):
            f=np.zeros(self.N,d); f[self.m]=got[:,j]; self.put(r.strip(),f)
    def i_st(self,I):
        d=DT[I.mods[-1]]; n=self.vecn(I); buf,am=self.resolve(I,I.args[0],d.itemsize*n)
        vals=[np.broadcast_to(self.g(r.strip(),I.mods[-1]),(self.N,))[self.m] for r in I.args[1].strip('{}').split(',')]
        if buf is None: self.gstore(am,vals,d,I,d.itemsize*n); return
        v=buf.view(d)
        if buf is self.sh: self.chk(I,am,d.itemsize*n,True)
        for j,x in enumerate(vals): v[am//d.itemsize+j]=x
    def i_cp(self,I):
        # cp.async is applied only at wait_group: data a kernel forgot to wait for stays poisoned
        if 'commit_group' in I.mods: self.cpg[self.m]+=1; return
        if 'wait_group' in I.mods or 'wait_all' in I.mods:
            n=int(I.args[0]) if 'wait_group' in I.mods else -1; rest=[]
            for ln,g,dst,data in self.cpq:
                ok=self.m[ln]&(g<self.cpg[ln]-n)
                for k in range(data.shape[1]): self.sh[dst[ok]+k]=data[ok,k]
                if (~ok).any(): rest.append((ln[~ok],g[~ok],dst[~ok],data[~ok]))
            self.cpq=rest; return
        n=int(I.args[2]); J=Ins(); J.text=I.text; J.mods=['shared']; b1,a1=self.resolve(J,I.args[0],n); J.mods=['global']; _,a2=self.resolve(J,I.args[1],n); self.chk(I,a1,n,True)
        ln=np.nonzero(self.m)[0]; self.cpq.append((ln,self.cpg[ln].copy(),a1,self.cpread(a2,n,I))); self.sh[(a1[:,None]+np.arange(n)).reshape(-1)]=255
    def cpread(self,a2,n,I):
        if len(I.args)<4: return self.gload(a2,np.dtype(np.uint8),n,I,n)
        sb=np.broadcast_to(self.g(I.args[3],'u32'),(self.N,))[self.m]; out=np.zeros((len(a2),n),np.uint8)
        for size in np.unique(sb):
            size=int(size); w=np.nonzero(sb==size)[0]
            if size>n: raise PTXError('cp.async reads more than it copies: '+I.text)
            if size:
                keep=self.m; self.m=np.zeros(self.N,bool); self.m[np.nonzero(keep)[0][w]]=True
                out[w,:size]=self.gload(a2[w],np.dtype(np.uint8),size,I,size); self.m=keep
        return out
    def i_atom(self,I,ret=True):
        t=I.mods[-1]; d=DT[t]; o=I.args if not ret else I.args[1:]; buf,am=self.resolve(I,o[0],d.itemsize); glob=buf is None
        if glob:
            (al,_,am),=self.parts(am,d.itemsize,I); buf=al.data
        v=buf.view(d); op=next(x for x in I.mods if x in('add','max','min','cas','exch','and','or','xor','inc','dec')); x=np.broadcast_to(self.g(o[1],t),(self.N,))[self.m]; y=np.broadcast_to(self.g(o[2],t),(self.N,))[self.m] if op=='cas' else None; out=np.zeros(self.N,d); old=np.zeros(len(am),d)
        for i,a in enumerate(am//d.itemsize):
            c=old[i]=v[a]; b=x[i]; v[a]=c+b if op=='add' else max(c,b) if op=='max' else min(c,b) if op=='min' else (y[i] if c==b else c) if op=='cas' else b if op=='exch' else c&b if op=='and' else c|b if op=='or' else c^b if op=='xor' else (0 if c>=b else c+1) if op=='inc' else (b if c==0 or c>b else c-1)
        out[self.m]=old
        if ret: self.put(I.args[0],out)
    def i_red(self,I): self.i_atom(I,False)
    def i_nop(self,I): pass
    i_membar=i_fence=i_prefetch=i_nanosleep=i_nop
    # arithmetic
    def bin(self,I,f): t=I.mods[-1]; self.put(I.args[0],f(self.g(I.args[1],t),self.g(I.args[2],t)))
    def _ov(self,v,t): return v
    def i_add(self,I):
        if 'cc' in I.mods: self._addcc(I,False); return
        self.bin(I,lambda a,b:a+b); self._sat(I)
    def i_sub(self,I): self.bin(I,lambda a,b:a-b)
    def _sat(self,I):
        if 'sat' in I.mods: self.put(I.args[0],np.clip(self.g(I.args[0],I.mods[-1]),0,1))
    def _wide(self,a,b): return a.astype(np.dtype(a.dtype.kind+str(2*a.dtype.itemsize)))*b.astype(np.dtype(b.dtype.kind+str(2*b.dtype.itemsize)))
    def _hi(self,a,b):
        w=8*a.dtype.itemsize
        if w<64: return (self._wide(a,b)>>w).astype(a.dtype)
        a,b=np.broadcast_arrays(a,b); return np.array([((int(x)*int(y))>>64)&0xffffffffffffffff for x,y in zip(a,b)],np.uint64).view(a.dtype)
    def _mul(self,I,a,b): return self._wide(a,b) if 'wide' in I.mods else self._hi(a,b) if 'hi' in I.mods else a*b
    def i_mul(self,I): self.bin(I,lambda a,b:self._mul(I,a,b)); self._sat(I)
    i_mul24=i_mul
    def i_mad(self,I,carry=False):
        t=I.mods[-1]
        if t[0]=='f': return self.i_fma(I)
        a,b=self.g(I.args[1],t),self.g(I.args[2],t); x=self._mul(I,a,b); ct=t[0]+str(8*x.dtype.itemsize); c=self.g(I.args[3],ct); s=x+c
        if carry: s2=s+self.cc.astype(s.dtype)
        else: s2=s
        if 'cc' in I.mods: co=(np.asarray(s).view(U[s.dtype.itemsize])<np.asarray(x).view(U[s.dtype.itemsize]))|((s2!=s)&(s2==0)); np.copyto(self.cc,co,where=self.m)
        self.put(I.args[0],s2)
    def i_madc(self,I): self.i_mad(I,True)
    def i_addc(self,I): self._addcc(I,True)
    def _addcc(self,I,carry):
        t=I.mods[-1].replace('s','u'); a,b=self.g(I.args[1],t),self.g(I.args[2],t); s=a+b; s2=s+self.cc.astype(s.dtype) if carry else s
        if 'cc' in I.mods: np.copyto(self.cc,(s<a)|((s2!=s)&(s2==0)),where=self.m)
        self.put(I.args[0],s2)
    def i_fma(self,I):
        t=I.mods[-1]; a,b,c=[self.g(x,t) for x in I.args[1:4]]; h=np.float64 if t!='f64' else np.longdouble
        r=a.astype(h)*b.astype(h)+c.astype(h); v=r.astype(DT[t])
        if 'rm' in I.mods: v=np.where(v.astype(h)>r,np.nextafter(v,DT[t].type(-np.inf)),v)
        if 'rp' in I.mods: v=np.where(v.astype(h)<r,np.nextafter(v,DT[t].type(np.inf)),v)
        if 'rz' in I.mods: v=np.where(np.abs(v.astype(h))>np.abs(r),np.nextafter(v,DT[t].type(0)),v)
        self.put(I.args[0],v); self._sat(I)
    def _idiv(self,a,b):
        q=np.abs(a.astype(np.float64) if 0 else a); b0=np.where(b==0,1,b).astype(b.dtype)
        if a.dtype.kind=='u': return a//b0
        q=a//b0; r=a-q*b0; return np.where((r!=0)&((r<0)!=(b0<0))|((r!=0)&((a<0)!=(b0<0))),q+1,q).astype(a.dtype)
    def i_div(self,I): self.bin(I,lambda a,b:a/b if I.mods[-1][0]=='f' else self._idiv(a,b))
    def i_rem(self,I): self.bin(I,lambda a,b:a-self._idiv(a,b)*b)
    def i_min(self,I): self.bin(I,np.fmin if I.mods[-1][0]=='f' else np.minimum)
    def i_max(self,I): self.bin(I,np.fmax if I.mods[-1][0]=='f' else np.maximum)
    def i_and(self,I): self.bin(I,lambda a,b:a&b)
    def i_or(self,I): self.bin(I,lambda a,b:a|b)
    def i_xor(self,I): self.bin(I,lambda a,b:a^b)
    def i_not(self,I): self.put(I.args[0],~self.g(I.args[1],I.mods[-1]))
    def i_neg(self,I): self.put(I.args[0],-self.g(I.args[1],I.mods[-1]))
    def i_abs(self,I): self.put(I.args[0],np.abs(self.g(I.args[1],I.mods[-1])))
    def _sh(self,I,left):
        t=I.mods[-1]; a=self.g(I.args[1],t); w=8*a.dtype.itemsize; n=self.g(I.args[2],'u32').astype(np.uint64); c=np.minimum(n,w-1).astype(a.dtype)
        r=(a<<c if left else a>>c); 
        if left or a.dtype.kind=='u': r=np.where(n>=w,a.dtype.type(0),r)
        self.put(I.args[0],r)
    def i_shl(self,I): self._sh(I,True)
    def i_shr(self,I): self._sh(I,False)
    def i_shf(self,I):
        a,b,c=[self.g(x,'u32').astype(np.uint64) for x in I.args[1:4]]; c=np.minimum(c,32) if 'clamp' in I.mods else c&np.uint64(31); x=b<<np.uint64(32)|a; self.put(I.args[0],((x<<c)>>np.uint64(32) if 'l' in I.mods else x>>c).astype(np.uint32))
    def i_bfe(self,I):
        t=I.mods[-1]; a=self.g(I.args[1],t); w=8*a.dtype.itemsize; p=self.g(I.args[2],'u32').astype(np.int64)&255; l=self.g(I.args[3],'u32').astype(np.int64)&255; u=a.astype(np.int64).astype(np.uint64) if w<64 else a.view(np.uint64); m=np.where(l>=64,np.uint64(2**64-1),(np.uint64(1)<<np.minimum(l,63).astype(np.uint64))-np.uint64(1)); r=(u>>p.astype(np.uint64))&m
        if t[0]=='s': s=(r>>np.maximum(l-1,0).astype(np.uint64))&np.uint64(1); r=np.where((s==1)&(l>0),r|~m,r)
        self.put(I.args[0],r.astype(U[a.dtype.itemsize]))
    def i_bfi(self,I):
        t=I.mods[-1]; w=DT[t].itemsize*8; a,b=[self.g(x,t).astype(np.uint64) for x in I.args[1:3]]; p,l=[int(x) for x in I.args[3:5]]; m=np.uint64(((1<<l)-1)<<p&(1<<w)-1); self.put(I.args[0],((b&~m)|((a<<np.uint64(p))&m)).astype(U[w//8]))
    def i_prmt(self,I):
        a,b=[self.g(x,'u32').astype(np.uint64) for x in I.args[1:3]]; s=np.broadcast_to(self.g(I.args[3],'u32'),(self.N,)); x=b<<np.uint64(32)|a; r=np.zeros(self.N,np.uint32)
        for k in range(4): n=(s>>np.uint32(4*k))&np.uint32(15); by=((x>>((n&np.uint32(7)).astype(np.uint64)*np.uint64(8)))&np.uint64(255)).astype(np.uint32); by=np.where(n&8,np.where(by&128,np.uint32(255),np.uint32(0)),by); r|=by<<np.uint32(8*k)
        self.put(I.args[0],r)
    def i_popc(self,I): self.put(I.args[0],np.bitwise_count(self.g(I.args[1],I.mods[-1])).astype(np.uint32))
    def i_clz(self,I):
        a=self.g(I.args[1],I.mods[-1]); w=8*a.dtype.itemsize; self.put(I.args[0],np.array([w-int(x).bit_length() for x in np.broadcast_to(a,(self.N,))],np.uint32))
    def i_bfind(self,I):
        t=I.mods[-1]; a=np.broadcast_to(self.g(I.args[1],t),(self.N,)); a=np.where(a<0,~a,a) if t[0]=='s' else a; w=8*a.dtype.itemsize; r=np.array([int(x).bit_length()-1 for x in a]); r=np.where(r>=0,w-1-r,-1) if 'shiftamt' in I.mods else r; self.put(I.args[0],(r&0xffffffff).astype(np.uint32))
    def i_brev(self,I): self.put(I.args[0],np.array([int(f'{int(x):032b}'[::-1],2) for x in np.broadcast_to(self.g(I.args[1],'u32'),(self.N,))],np.uint32))
    def i_mov(self,I):
        t=I.mods[-1]; d,s=I.args[0],I.args[1]
        if d[0]=='{':
            parts=d.strip('{}').split(','); w=8*DT[t].itemsize//len(parts); a=self.g(s,t).view(U[DT[t].itemsize])
            for i,r in enumerate(parts): self.put(r.strip(),(a>>a.dtype.type(w*i)).astype(U[w//8]))
        elif s[0]=='{':
            parts=s.strip('{}').split(','); D=DT[t]; w=8*D.itemsize//len(parts); r=np.zeros(self.N,U[D.itemsize])
            for i,x in enumerate(parts): r|=self.g(x.strip(),'u'+str(w)).astype(r.dtype)<<r.dtype.type(w*i)
            self.put(d,r)
        else: self.put(d,self.g(s,t))
    def i_cvta(self,I):
        sp=next(x for x in I.mods if x in('global','shared','local','param','const')); a=self.g(I.args[1],I.mods[-1]); b={'global':0,'const':0,'shared':SBASE,'local':LBASE,'param':0}[sp]
        self.put(I.args[0],a-np.uint64(b) if 'to' in I.mods else a+np.uint64(b))
    def i_selp(self,I): t=I.mods[-1]; self.put(I.args[0],np.where(self.g(I.args[3],'pred'),self.g(I.args[1],t),self.g(I.args[2],t)))
    def i_slct(self,I): t=I.mods[-2]; self.put(I.args[0],np.where(self.g(I.args[3],I.mods[-1])>=0,self.g(I.args[1],t),self.g(I.args[2],t)))
    def i_setp(self,I,dst=None):
        t=I.mods[-1]; c=I.mods[0]; a,b=self.g(I.args[1],t),self.g(I.args[2],t); f=t[0]=='f'; nan=(np.isnan(a)|np.isnan(b)) if f else False
        base=c[:-1] if (f and len(c)==3 and c[2]=='u') else {'lo':'lt','ls':'le','hi':'gt','hs':'ge'}.get(c,c)
        if c=='num': r=~nan
        elif c=='nan': r=nan
        else:
            r={'eq':np.equal,'ne':np.not_equal,'lt':np.less,'le':np.less_equal,'gt':np.greater,'ge':np.greater_equal}[base](a,b)
            if f: r=(r|nan) if (len(c)==3 and c[2]=='u') else (r&~nan)
        if len(I.mods)>2 and I.mods[1] in('and','or','xor'): q=self.g(I.args[3],'pred'); r=r&q if I.mods[1]=='and' else r|q if I.mods[1]=='or' else r^q
        d,_,d2=I.args[0].partition('|'); self.put(d,r); 
        if d2: self.put(d2,~r)
    def i_cvt(self,I):
        dt,st=I.mods[-2],I.mods[-1]; md=I.mods[:-2]
        if st=='bf16' : v=(self.g(I.args[1],'u16').astype(np.uint32)<<np.uint32(16)).view(np.float32); st='f32'
        elif dt in('bf16x2','f16x2'): a,b=[self.cvt16(self.g(x,'f32'),dt[:-2]).astype(np.uint32) for x in I.args[1:3]]; self.put(I.args[0],a<<np.uint32(16)|b); return
        else: v=self.g(I.args[1],st)
        if dt=='bf16': self.put(I.args[0],self.cvt16(v,'bf16')); return
        D=DT[dt]; s=v.dtype
        if s.kind=='f':
            for m,f in(('rni',np.rint),('rzi',np.trunc),('rmi',np.floor),('rpi',np.ceil)):
                if m in md: v=f(v)
            if D.kind!='f': i=np.iinfo(D); v=np.where(np.isnan(v),0,np.clip(v.astype(np.float64),float(i.min),float(i.max))); r=np.where(v>=float(i.max),D.type(i.max),np.where(v>=float(i.max),0,v).astype(D)) 
            else:
                r=v.astype(D)
                if 'sat' in md: r=np.where(np.isnan(r),0,np.clip(r,0,1)).astype(D)
                if 'rz' in md: r=np.where(np.abs(r.astype(np.float64))>np.abs(v.astype(np.float64)),np.nextafter(r,D.type(0)),r)
        else:
            if 'sat' in md and D.kind!='f': i=np.iinfo(D); v=np.clip(v,max(i.min,np.iinfo(s).min),min(i.max,np.iinfo(s).max))
            r=v.astype(D)
        self.put(I.args[0],r)
    def cvt16(self,v,k):
        if k=='f16': return v.astype(np.float16).view(np.uint16)
        u=v.view(np.uint32); r=((u+np.uint32(0x7fff)+((u>>np.uint32(16))&np.uint32(1)))>>np.uint32(16)).astype(np.uint16); return np.where(np.isnan(v),np.uint16(0x7fff),r)
    def un(self,I,f): t=I.mods[-1]; self.put(I.args[0],f(self.g(I.args[1],t).astype(np.float64)).astype(DT[t]))
    def i_ex2(self,I): self.un(I,np.exp2)
    def i_lg2(self,I): self.un(I,np.log2)
    def i_rcp(self,I): self.un(I,lambda a:1/a)
    def i_sqrt(self,I): self.un(I,np.sqrt)
    def i_rsqrt(self,I): self.un(I,lambda a:1/np.sqrt(a))
    def i_sin(self,I): self.un(I,np.sin)
    def i_cos(self,I): self.un(I,np.cos)
    def i_tanh(self,I): self.un(I,np.tanh)
    def i_copysign(self,I): self.bin(I,lambda a,b:np.copysign(b,a))
    def i_testp(self,I): a=self.g(I.args[1],I.mods[-1]); self.put(I.args[0],{'infinite':np.isinf,'finite':np.isfinite,'notanumber':np.isnan,'number':lambda x:~np.isnan(x)}[I.mods[0]](a))

def launch(ptx,entry,grid,block,args,shared_bytes=0,checks=True,memory=None):
    """Runs ``entry`` of ``ptx`` on ``memory``; ``args`` are pointers (ints of DeviceMemory) and scalars. Returns counters."""
    k=_parsed.get(ptx)
    if k is None: k=_parsed[ptx]=Kernel(ptx)
    if entry!=k.name: raise PTXError(f'no entry {entry}; the PTX has {k.name}')
    nb=int(np.prod(grid)); bt=int(np.prod(block)); step=max(1,16384//((bt+31)//32*32)); n=0
    for b0 in range(0,nb,step): n+=Run(k,memory,grid,block,args,shared_bytes,checks,b0,min(step,nb-b0)).go().icount
    return {'instructions':n}
_parsed={}
def run(kernel,grid,args,cc=(8,0),checks=True,block=None,shared_bytes=None):
    """Compiles ``kernel`` and runs it on NumPy arrays and scalars; arrays hold what the kernel left in them."""
    from cuda_kernels.toolchain.compile import compile_ptx
    memory=DeviceMemory(); names=kernel.body.__code__.co_varnames
    ptrs=[memory.upload(a,nm) if isinstance(a,np.ndarray) else a for a,nm in zip(args,names)]
    c=launch(compile_ptx(kernel,cc),kernel.entry,grid,block or kernel.block,ptrs,kernel.shared_bytes if shared_bytes is None else shared_bytes,checks,memory)
    for a,p in zip(args,ptrs):
        if isinstance(a,np.ndarray): a[...]=memory.read(p,a.shape,a.dtype)
    return c
