# %% [markdown] en
# # 02 · A block allocator from scratch
#
# **Goal.** Write the small piece of bookkeeping on which paging rests: who holds which block of KV memory, where
# token number *p* of a sequence lies, and what happens when the blocks run out. Then meet the engine's own
# [`BlockPool`](../../minipaged/core/block_pool.py). About 15 minutes; no arrays, only integers.
#
# In step 01 we saw that memory reserved in one piece is mostly empty. The remedy is to cut it into **blocks** of
# `block_size` tokens each. A block is named by its **block id**, and the blocks that nobody holds form the
# **block pool**. A sequence takes a block only when its last one is full.
# %% [markdown] tr
# # 02 · Sıfırdan bir blok ayırıcı
#
# **Amaç.** Sayfalamanın dayandığı küçük kayıt düzenini yazmak: KV belleğinin hangi bloğu kimde, bir dizinin *p*
# numaralı tokenı nerede, bloklar tükenince ne oluyor? Ardından motorun kendi
# [`BlockPool`](../../minipaged/core/block_pool.py) sınıfıyla tanışacaksınız. Yaklaşık 15 dakika; NumPy yok, yalnızca
# tamsayılar.
#
# 01. adımda, tek parça hâlinde ayrılan belleğin çoğunun boş kaldığını gördük. Çare, belleği `block_size` token alan
# **bloklara** (block) bölmek. Her bloğun bir **blok kimliği** (block id) vardır; kimsede olmayan bloklar **blok
# havuzunu** (block pool) oluşturur. Bir dizi (sequence), yeni bir bloğu ancak son bloğu dolduğunda alır.

# %%
from minipaged.core.block_pool import BlockPool, NoFreeBlocksError
from minipaged.core.block_table import BlockTable
from tutorials.course import show
from tutorials.course.drawing import draw_tables

pool = BlockPool(num_blocks=12)
tables = {name: BlockTable(4, pool) for name in "abc"}  # 4 tokens a block
num_tokens = {"a": 14, "b": 6, "c": 9}
for position in range(14):  # they grow in turn, so their blocks interleave
    for name, table in tables.items():
        if position < num_tokens[name]:
            table.append_slots(position, position + 1)
show(draw_tables(pool, tables, num_tokens), "three sequences, their blocks scattered over a pool of 12")
print({name: table.block_ids for name, table in tables.items()})
assert tables["a"].block_ids == [0, 3, 6, 8] and pool.num_free == 3

# %% [markdown] en
# That is what we are after: sequence `a` has 14 tokens in blocks 0, 3, 6 and 8. They lie nowhere near each other, and
# it does not matter, because the list says where they are.
#
# ## The naive version
#
# One list says for each block who holds it. To find a free block, look from the front:
# %% [markdown] tr
# Varmak istediğimiz yer bu: `a` dizisinin 14 tokenı 0, 3, 6 ve 8 numaralı bloklarda. Bloklar yan yana değil, olması da
# gerekmez; nerede olduklarını liste söyler.
#
# ## İlk akla gelen çözüm
#
# Tek bir liste, her bloğun kimde olduğunu söylesin. Boş blok aramak için baştan başlayıp bakalım:

# %%
class NaiveAllocator:
    def __init__(self, num_blocks):
        self.holder = [None] * num_blocks
        self.num_looked_at = 0

    def allocate(self, name, n):
        taken = []
        for block_id, holder in enumerate(self.holder):
            if len(taken) == n:
                break
            self.num_looked_at += 1
            if holder is None:
                self.holder[block_id] = name
                taken.append(block_id)
        if len(taken) < n:
            raise MemoryError(f"{n} blocks wanted, {len(taken)} found")
        return taken


naive = NaiveAllocator(num_blocks=4096)
naive.allocate("long", 4000)
naive.num_looked_at = 0
print("taken:", naive.allocate("short", 1), "looked at:", naive.num_looked_at)
assert naive.num_looked_at == 4001

# %% [markdown] en
# ## What hurts
#
# For one block we looked at 4001 entries, and an engine does this in every step. Worse is what happens when the
# blocks do not suffice:
# %% [markdown] tr
# ## Sorun nerede?
#
# Tek bir blok için 4001 kayda baktık; üstelik motor bunu her adımda yapar. Bloklar yetmediğinde olan ise daha kötü:

# %%
try:
    naive.allocate("greedy", 200)
except MemoryError as error:
    print("refused:", error)
leaked = naive.holder.count("greedy")
print("blocks lost to a request that was refused:", leaked)
assert leaked == 95

# %% [markdown] en
# The request was refused and yet it holds 95 blocks that nobody will give back. A call that fails must change
# nothing: **all or nothing** is a law of the engine.
#
# ## The new version
#
# - Keep the free blocks in a queue. Taking one costs the same however many blocks there are.
# - Count before you take. If the blocks do not suffice, raise before anything has changed.
# - For each sequence keep the list of its block ids in the order of its tokens. Then token *p* lies in block number
#   `p // block_size` of that list.
# %% [markdown] tr
# İstek reddedildi, ama 95 blok hâlâ onda ve kimse bunları geri vermeyecek. Başarısız olan bir çağrı hiçbir şeyi
# değiştirmemelidir: **ya hep ya hiç** (all or nothing), motorun yasalarından biridir.
#
# ## Yeni çözüm
#
# - Boş blokları bir kuyrukta tutun. Kaç blok olursa olsun birini almanın bedeli aynıdır.
# - Almadan önce sayın. Bloklar yetmiyorsa hiçbir şey değişmeden hata verin.
# - Her dizi için blok kimliklerini token sırasıyla bir listede tutun. Böylece *p* numaralı token, bu listenin
#   `p // block_size` numaralı bloğundadır.

# %% [exercise] Allocator
class Allocator:
    """Blocks for sequences (roughly 12 lines to write).

    Attributes:
        free_ids: deque of the ids of free blocks; take from the left, give back to the right.
        block_ids: dict from a sequence's name to the list of its block ids, in the order of its tokens.
    """

    def __init__(self, num_blocks, block_size):
        from collections import deque

        self.block_size = block_size
        self.free_ids = deque(range(num_blocks))
        self.block_ids = {}

    def grow(self, name, num_tokens):
        """Let sequence `name` hold `num_tokens` tokens in all; take as few blocks as that needs.

        A sequence not seen before starts with no blocks. Raises MemoryError if too few are free, and then
        nothing has changed.
        """
        raise NotImplementedError

    def locate(self, name, position):
        """`(block id, offset in the block)` of the token at `position`."""
        raise NotImplementedError

    def free(self, name):
        """Give all blocks of sequence `name` back and forget it."""
        raise NotImplementedError

# %% [solution] Allocator
class Allocator:
    def __init__(self, num_blocks, block_size):
        from collections import deque

        self.block_size = block_size
        self.free_ids = deque(range(num_blocks))
        self.block_ids = {}

    def grow(self, name, num_tokens):
        held = self.block_ids.get(name, [])
        missing = -(-num_tokens // self.block_size) - len(held)  # rounded up
        if missing > len(self.free_ids):
            raise MemoryError(f"{missing} blocks wanted, {len(self.free_ids)} free")
        self.block_ids[name] = held + [self.free_ids.popleft() for _ in range(missing)]

    def locate(self, name, position):
        return self.block_ids[name][position // self.block_size], position % self.block_size

    def free(self, name):
        self.free_ids.extend(self.block_ids.pop(name))

# %% [check] Allocator
from tutorials.course import check
from tutorials.course.step02 import examine_allocator

check("Allocator", examine_allocator, Allocator)

# %% [wrong] Allocator: 3 tokens needs 1 blocks of 4; it has 0
class Allocator(Allocator):
    def grow(self, name, num_tokens):
        held = self.block_ids.setdefault(name, [])
        while len(held) < num_tokens // self.block_size:  # rounded down
            held.append(self.free_ids.popleft())

# %% [wrong] Allocator: must raise MemoryError.*IndexError
class Allocator(Allocator):
    def grow(self, name, num_tokens):
        held = self.block_ids.setdefault(name, [])
        while len(held) < -(-num_tokens // self.block_size):
            held.append(self.free_ids.popleft())  # runs dry half way

# %% [wrong] Allocator: was refused.* 0 blocks are free
class Allocator(Allocator):
    def grow(self, name, num_tokens):
        held = self.block_ids.setdefault(name, [])
        while len(held) < -(-num_tokens // self.block_size):
            if not self.free_ids:
                raise MemoryError("no block is free")  # but those taken so far are kept
            held.append(self.free_ids.popleft())

# %% [wrong] Allocator: token 5 .* block 2, offset 1.*\(0, 1\)
class Allocator(Allocator):
    def grow(self, name, num_tokens):
        held = self.block_ids.get(name, [])
        missing = -(-num_tokens // self.block_size) - len(held)
        if missing > len(self.free_ids):
            raise MemoryError
        self.block_ids[name] = held + [self.free_ids.popleft() for _ in range(missing)]

    def locate(self, name, position):
        return self.block_ids[name][0], position % self.block_size

# %% [markdown] en
# ## The engine's own
#
# In the engine two classes share this work. [`BlockPool`](../../minipaged/core/block_pool.py) knows the blocks and the
# free queue; a [`BlockTable`](../../minipaged/core/block_table.py) is the list of one sequence, the **block table**:
# %% [markdown] tr
# ## Motorun kendisi
#
# Motorda bu işi iki sınıf paylaşır. Blokları ve boş blok kuyruğunu [`BlockPool`](../../minipaged/core/block_pool.py)
# bilir; tek bir dizinin listesi ise bir [`BlockTable`](../../minipaged/core/block_table.py), yani **blok
# tablosudur** (block table):

# %%
pool = BlockPool(num_blocks=6)
a, b = BlockTable(4, pool), BlockTable(4, pool)
a.append_slots(0, 3)  # positions 0, 1, 2
b.append_slots(0, 4)
a.append_slots(3, 6)  # one more fits into the block held, two do not
print("a", a.block_ids, "b", b.block_ids, "free", pool.num_free)
assert (a.block_ids, b.block_ids, pool.num_free) == ([0, 2], [1], 3)

try:
    b.append_slots(4, 24)
except NoFreeBlocksError as error:
    print("refused:", error)
assert pool.num_free == 3
pool.check([a.blocks, b.blocks])  # raises if a block is lost or in two places

a.release()
print("free queue", [block.block_id for block in pool.free_queue()])
assert [block.block_id for block in pool.free_queue()] == [0, 2, 3, 4, 5]

# %% [markdown] en
# Two things differ from ours, and both have a reason:
#
# - Freed blocks go to the *front* of the **free queue** and are used again at once. Only blocks whose content somebody
#   may want to find again (step 10) go to the back, and so live longer.
# - A block counts its holders in `ref_cnt`, because several sequences may share one (step 09).
#
# `check` states the law of conservation: every block is held or free, never both and never neither. The engine's tests
# call it after every step.
#
# ## What to read next
#
# - [`block_pool.py`](../../minipaged/core/block_pool.py): the docstring at its top draws the free queue.
# - [`test_block_pool.py`](../../tests/core/test_block_pool.py): random calls against the law of conservation.
# %% [markdown] tr
# Bizimkinden iki farkı var, ikisinin de bir nedeni:
#
# - Geri verilen bloklar **boş blok kuyruğunun** (free queue) *başına* geçer ve hemen yeniden kullanılır. Yalnızca
#   içeriği ileride yeniden aranabilecek bloklar (10. adım) sona eklenir ve böylece daha uzun yaşar.
# - Her blok, kaç tabloda tutulduğunu `ref_cnt` alanında sayar; çünkü bir bloğu birkaç dizi paylaşabilir (09. adım).
#
# `check`, korunum yasasını dile getirir: her blok ya birindedir ya boştur; ikisi birden ya da hiçbiri olamaz. Motorun
# testleri bunu her adımdan sonra çağırır.
#
# ## Sırada ne okumalı?
#
# - [`block_pool.py`](../../minipaged/core/block_pool.py): en başındaki docstring boş blok kuyruğunu çizer.
# - [`test_block_pool.py`](../../tests/core/test_block_pool.py): rastgele çağrılar korunum yasasına karşı.
