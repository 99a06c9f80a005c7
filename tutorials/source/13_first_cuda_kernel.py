# %% [markdown] en
# # 13 · Your first CUDA kernel, without a GPU
#
# **Goal.** Write a kernel, run it on this machine, and see what it would ask of a card's memory: which threads read
# what, how many bytes move, and what happens at the edges. About 15 minutes. You need NumPy; the earlier steps are
# not assumed.
#
# This step and the next two need CUDA's compiler, which is a package like any other and asks for no GPU: `pip install
# 'minipaged[cuda]' greenlet`. The extra `tutorials` brings both.

# %% [markdown] tr
# # 13 · GPU'suz ilk CUDA çekirdeğiniz
#
# **Amaç.** Bir çekirdek (kernel) yazmak, onu bu makinede çalıştırmak ve bir kartın belleğinden neler isteyeceğini
# görmek: hangi iş parçacığı neyi okuyor, kaç bayt taşınıyor, kenarlarda ne oluyor. Yaklaşık 15 dakika. NumPy bilmek
# yeterli; önceki adımlar gerekmez.
#
# Bu adımla sonraki ikisi CUDA derleyicisini ister. Derleyici sıradan bir pakettir, GPU aramaz: `pip install
# 'minipaged[cuda]' greenlet`. `tutorials` eki ikisini de getirir.

# %%
import importlib.util

import numpy as np

if missing := [name for name in ("numba_cuda", "cuda", "greenlet") if importlib.util.find_spec(name) is None]:
    raise ImportError(f"missing: {', '.join(missing)}; pip install 'minipaged[cuda]' greenlet (no GPU needed)")

from numba import cuda

from cuda_kernels.kernel import Kernel, float32, int32, pointer
from cuda_kernels.toolchain import simulator
from cuda_kernels.toolchain.accesses import record_accesses
from cuda_kernels.toolchain.compile import compile_ptx
from cuda_kernels.toolchain.examples import example
from cuda_kernels.toolchain.interpreter import KernelFault, run
from minipaged.view import draw_threads
from tutorials.course import check, show

floats = pointer(float32)

# %% [markdown] en
# ## One function, many threads
#
# A **kernel** is a function that thousands of **threads** run at the same time. Threads come in **blocks**, and each
# knows its place: `threadIdx.x` in its block, `blockIdx.x` of its block, `blockDim.x` threads a block. Data are flat
# pointers, as in C. A launch says how many blocks (the **grid**) of how many threads there are.
#
# 100 elements, blocks of 32 threads: 4 blocks, 128 threads, of which the last 28 must do nothing.

# %% [markdown] tr
# ## Tek fonksiyon, çok sayıda iş parçacığı
#
# Çekirdek, binlerce **iş parçacığının** (thread) aynı anda çalıştırdığı bir fonksiyondur. İş parçacıkları **bloklar**
# hâlinde gelir ve her biri yerini bilir: `threadIdx.x` bloğun içindeki yeri, `blockIdx.x` bloğunun numarası,
# `blockDim.x` bir bloktaki iş parçacığı sayısıdır. (Bu bloklar KV bloklarıyla karıştırılmasın.) Veri, C'deki gibi düz
# işaretçilerle verilir. Başlatma (launch), kaç iş parçacıklı kaç blok olacağını söyler; blokların tümüne **ızgara**
# (grid) denir.
#
# 100 öğe, 32 iş parçacıklı bloklar: 4 blok, 128 iş parçacığı; son 28'i hiçbir şey yapmamalı.

# %%
def add(x, y, out, count):
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < count:
        out[i] = x[i] + y[i]


add_kernel = Kernel("add", add, (floats, floats, floats, int32), block=32)
x, y, out = np.arange(100, dtype=np.float32), np.ones(100, np.float32), np.zeros(100, np.float32)
simulator.run(add_kernel, 4, [x, y, out, 100])
print(out[:3], "...", out[-1])
assert (out == x + y).all()

# %% [markdown] en
# That was the **simulator**: each thread runs your Python, so `print` and a debugger work in it. The second tool is
# sterner. It compiles the kernel to **PTX**, the assembly that a driver would load, and **interprets** those very
# instructions while it watches every access:

# %% [markdown] tr
# Bu, **benzeticiydi** (simulator): her iş parçacığı yazdığınız Python'ı çalıştırır; içinde `print` de hata ayıklayıcı
# da iş görür. İkinci araç daha titizdir. Çekirdeği, sürücünün yükleyeceği çevirici dili olan **PTX**'e derler, tam da
# bu komutları **yorumlar** ve bu sırada her erişimi izler:

# %%
lines = [" ".join(line.split()) for line in compile_ptx(add_kernel, (8, 0)).splitlines()]
print("in PTX:", *[line for line in lines if line.startswith(("ld.global", "add.f32", "add.rn.f32", "st.global"))])
out[:] = 0
counters = run(add_kernel, 4, [x, y, out, 100])
assert (out == x + y).all()
print("bytes asked for:", counters.load.bytes, " 32-byte sectors that moved:", counters.load.sectors)
assert (counters.load.bytes, counters.load.sectors) == (800, 26)


def unguarded(x, y, out, count):
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    out[i] = x[i] + y[i]


try:
    run(Kernel("unguarded", unguarded, (floats, floats, floats, int32), block=32), 4, [x, y, out, 100])
except KernelFault as fault:
    message = str(fault)
print(message.split(": ld.")[0])
assert message.startswith("out of bounds: block (3, 0, 0) thread 4: read of 4 bytes at offset 400 of x")

# %% [markdown] en
# Without the guard, thread 4 of block 3 reads element 100 of 100. A card might have returned anything.
#
# ## Naive: every thread takes a piece
#
# A programmer of CPUs cuts the work into pieces: thread 0 takes elements 0 to 63, thread 1 takes 64 to 127, and so
# on.

# %% [markdown] tr
# Sınır denetimi olmayınca 3. bloğun 4. iş parçacığı, 100 öğelik dizinin 100 numaralı öğesini okuyor. Gerçek bir kart
# herhangi bir şey döndürebilirdi.
#
# ## İlk akla gelen çözüm: her iş parçacığına bir parça
#
# CPU programcısı işi parçalara böler: 0. iş parçacığı 0 ile 63 arasını, 1. iş parçacığı 64 ile 127 arasını alır,
# böyle sürer.

# %%
COUNT = 4096


def add_pieces(x, y, out, count, piece):
    thread = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for j in range(piece):
        i = thread * piece + j
        if i < count:
            out[i] = x[i] + y[i]


pieces_kernel = Kernel("add_pieces", add_pieces, (floats, floats, floats, int32, int32), block=32)
rng = np.random.default_rng(13)
x, y = rng.standard_normal((2, COUNT)).astype(np.float32)
out = np.zeros_like(x)
pieces = run(pieces_kernel, 2, [x, y, out, COUNT, 64])
assert (out == x + y).all()
print("sectors loaded:", pieces.load.sectors, f" efficiency {pieces.load.efficiency:.1%}")
assert pieces.load.sectors == 8192 and pieces.load.efficiency == 0.125
accesses = record_accesses(pieces_kernel, 2, [x, y, out, COUNT, 64])
show(draw_threads(accesses[:1], "A piece for each thread"), "32 threads, each in a cache line of its own")

# %% [markdown] en
# The answer is right, and seven eighths of the traffic is waste. Memory moves in **sectors** of 32 bytes, 8 floats.
# The 32 threads of a **warp** execute the same instruction together, and here their 32 addresses are 256 bytes apart:
# 32 sectors move for 32 floats.
#
# ## New: neighbours read neighbours
#
# Let the threads of a warp read neighbouring elements, and let each jump ahead by the whole grid. Then 32 addresses
# fill 4 sectors. This is called **coalesced access**, and it is the first thing to get right in any kernel.

# %% [markdown] tr
# Yanıt doğru, ama trafiğin sekizde yedisi boşa gidiyor. Bellek 32 baytlık, yani 8 sayılık **sektörler** (sector)
# hâlinde taşınır. Bir **warp**'ın 32 iş parçacığı aynı komutu birlikte yürütür; burada 32 adresin arası 256 bayttır:
# 32 sayı için 32 sektör taşınır.
#
# ## Yeni çözüm: komşular komşuları okur
#
# Warp'ın iş parçacıkları komşu öğeleri okusun, sonra her biri bütün ızgara kadar ileri atlasın. O zaman 32 adres 4
# sektöre sığar. Buna **birleştirilmiş erişim** (coalesced access) denir; her çekirdekte ilk doğru yapılması gereken
# şey budur.

# %%
def add_strided(x, y, out, count):
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    while i < count:
        out[i] = x[i] + y[i]
        i += cuda.gridDim.x * cuda.blockDim.x


strided_kernel = Kernel("add_strided", add_strided, (floats, floats, floats, int32), block=32)
out = np.zeros_like(x)
strided = run(strided_kernel, 2, [x, y, out, COUNT])
assert (out == x + y).all()
print("sectors loaded:", strided.load.sectors, f" efficiency {strided.load.efficiency:.1%}")
assert strided.load.sectors == 1024 and strided.load.efficiency == 1
accesses = record_accesses(strided_kernel, 2, [x, y, out, COUNT])
show(draw_threads(accesses[:1], "Neighbours read neighbours"), "32 threads side by side in one cache line")

# %% [markdown] en
# 1024 sectors instead of 8192, for the same numbers. (There is no clock here: the interpreter counts, it does not
# measure. But a kernel that waits for memory, as nearly all of ours do, takes the time of its bytes.)
#
# ## Exercise: add a bias to every row
#
# `x` has `rows` x `cols` elements, row after row. Each thread has one element to do; there are enough threads for
# all, and a few more. The check looks at the result and at the **access score**: sectors moved against sectors
# needed.

# %% [markdown] tr
# Aynı sayılar için 8192 yerine 1024 sektör. (Burada saat yok: yorumlayıcı sayar, süre ölçmez. Ama belleği bekleyen
# bir çekirdek, ki bizimkilerin hemen hepsi öyledir, taşıdığı bayt kadar sürer.)
#
# ## Alıştırma: her satıra bir yanlılık eklemek
#
# `x`, satır satır dizilmiş `rows` x `cols` öğeden oluşur; her satıra aynı yanlılık (bias) vektörü eklenecek. Her iş
# parçacığına bir öğe düşer; iş parçacığı sayısı hepsine yeter, birkaçı da artar. Denetim hem sonuca hem de **erişim
# puanına** (access score) bakar: taşınan sektörlerin gerekenlere oranı.

# %% [exercise] add_bias
def add_bias(x, bias, out, rows, cols):
    """out[r, c] = x[r, c] + bias[c], as a kernel over flat pointers.

    x, out   float32 [rows * cols], row after row: element (r, c) is x[r * cols + c]
    bias     float32 [cols]
    NumPy:   out = x + bias
    Launched with blocks of 32 threads, at least rows * cols threads in all. (roughly 4 lines)
    """
    raise NotImplementedError


# %% [solution] add_bias
def add_bias(x, bias, out, rows, cols):
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < rows * cols:
        out[i] = x[i] + bias[i % cols]


# %% [check] add_bias
def check_add_bias(add_bias):
    rows, cols = 20, 50
    kernel = Kernel("add_bias", add_bias, (floats, floats, floats, int32, int32), block=32)
    rng = np.random.default_rng(1)
    x, bias = rng.standard_normal((rows, cols)).astype(np.float32), rng.standard_normal(cols).astype(np.float32)
    grid = -(-x.size // 32)

    def attempt(execute):
        out = np.full_like(x, np.nan)
        try:
            counters = execute(kernel, grid, [x.ravel(), bias, out.reshape(-1), rows, cols])
        except (KernelFault, IndexError) as fault:
            text = f"a thread left an array: {fault}. The last threads have no element; guard them"
            raise AssertionError(text) from None
        missing = np.argwhere(np.isnan(out))
        where = tuple(missing[0].tolist()) if len(missing) else ()
        assert not len(missing), f"element {where} was never written; blockIdx.x says which block you are"
        wrong = np.argwhere(out != x + bias)
        assert not len(wrong), f"element {tuple(wrong[0].tolist())} is wrong; its column is c = i % cols"
        return counters

    attempt(simulator.run)
    counters = attempt(run)
    moved = counters.load.sectors + counters.store.sectors
    assert moved <= 460, (
        f"right, but access score {420 / moved:.0%}: {moved} sectors moved where about 420 are enough. "
        "Let neighbouring threads take neighbouring elements"
    )


check("add_bias", check_add_bias, add_bias)


# %% [wrong] add_bias: a thread left an array
def add_bias(x, bias, out, rows, cols):  # no guard
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    out[i] = x[i] + bias[i % cols]


# %% [wrong] add_bias: element \(0, 32\) was never written
def add_bias(x, bias, out, rows, cols):  # forgets the block
    i = cuda.threadIdx.x
    if i < rows * cols:
        out[i] = x[i] + bias[i % cols]


# %% [wrong] add_bias: is wrong; its column is c = i % cols
def add_bias(x, bias, out, rows, cols):  # takes the row for the column
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < rows * cols:
        out[i] = x[i] + bias[i // cols]


# %% [wrong] add_bias: right, but access score
def add_bias(x, bias, out, rows, cols):  # a row for each thread: the pattern of the naive version
    r = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if r < rows:
        for c in range(cols):
            out[r * cols + c] = x[r * cols + c] + bias[c]


# %% [markdown] en
# ## A real one
#
# `rms_norm` of the engine's CUDA backend is the same pattern plus one sum over the threads of a block. The toolchain
# has an example launch of every kernel; this is the small one:

# %% [markdown] tr
# ## Gerçek bir çekirdek
#
# Motorun CUDA arka ucundaki `rms_norm`, aynı örüntünün üzerine bloktaki iş parçacıkları boyunca alınan tek bir toplam
# ekler. Araç takımında her çekirdek için örnek bir başlatma vardır; bu, küçük olanı:

# %% [varies]
subject = example("rms_norm")
counters = run(subject.kernel, subject.grid, subject.fresh())
print(f"rms_norm: loads {counters.load.efficiency:.0%} efficient, {counters.instructions} instructions by warps")
assert counters.load.efficiency > 0.9
print({kind: count for kind, count in counters.by_kind.items() if kind in ("load global", "barrier", "warp exchange")})

# %% [markdown] en
# Efficiency above 100% would mean that threads of a warp share what they read; below it, that sectors came for less
# than all of their bytes. `python -m cuda_kernels profile rms_norm` prints the whole report.
#
# ## What to read next
#
# - [`rms_norm.py`](../../cuda_kernels/rms_norm.py), and [`reductions.py`](../../cuda_kernels/reductions.py) for the
#   sum over a block.
# - [`simulator.py`](../../cuda_kernels/toolchain/simulator.py): a thread is a greenlet.
# - [`faults.py`](../../cuda_kernels/toolchain/interpreter/faults.py): what else the interpreter refuses: races,
#   memory never written, barriers that not all threads reach.
#
# Next: [14, paged attention in CUDA](14_paged_attention_in_cuda.ipynb).

# %% [markdown] tr
# Verimin %100'ü aşması, warp'taki iş parçacıklarının okuduklarını paylaştığını; altında kalması, sektörlerin bütün
# baytları kullanılmadan taşındığını gösterir. `python -m cuda_kernels profile rms_norm` raporun tamamını yazar.
#
# ## Sırada ne okumalı?
#
# - [`rms_norm.py`](../../cuda_kernels/rms_norm.py), blok boyunca toplam için de
#   [`reductions.py`](../../cuda_kernels/reductions.py).
# - [`simulator.py`](../../cuda_kernels/toolchain/simulator.py): her iş parçacığı bir greenlet'tir.
# - [`faults.py`](../../cuda_kernels/toolchain/interpreter/faults.py): yorumlayıcı başka neleri reddeder: yarışlar,
#   hiç yazılmamış bellek, her iş parçacığının ulaşmadığı bariyerler.
#
# Sonraki adım: [14, CUDA'da sayfalı dikkat](14_paged_attention_in_cuda.ipynb).
