# %% [markdown] en
# # 09 · Reference counts and copy-on-write
#
# **Goal.** Several continuations of one prompt, four samples or four beams, without keeping four copies of the
# prompt's KV. Afterwards you can say who holds which block, and which block has to be copied before which write.
# About 14 minutes. You need steps 02 (block allocator) and 03 (block tables).

# %% [markdown] tr
# # 09 · Referans sayıları ve yazarken kopyalama
#
# **Amaç.** Aynı istemin birden çok devamını (dört örnek ya da dört ışın), istemin KV'sini dört kez saklamadan
# üretmek. Bu adımın sonunda hangi bloğu kimin tuttuğunu ve hangi yazmadan önce hangi bloğun kopyalanması gerektiğini
# söyleyebileceksiniz. Yaklaşık 14 dakika. Önkoşul: 02 (blok ayırıcı) ve 03 (blok tabloları) adımları.

# %%
import numpy as np

from minipaged import Engine, EngineConfig, SamplingParams
from minipaged.core.block_pool import BlockPool
from minipaged.core.block_table import BlockTable
from minipaged.kv_cache import KVCache
from minipaged.view import draw_blocks
from tutorials.course import check, show

# %% [markdown] en
# ## Naive: every sample has a prompt of its own
#
# A prompt of 40 tokens, four samples of 16 tokens each, blocks of 16 tokens. If each sample is a sequence like any
# other, it takes `ceil(56 / 16) = 4` blocks, so four of them take 16, and three quarters of what they hold of the
# prompt is the same numbers again.

# %% [markdown] tr
# ## İlk akla gelen çözüm: her örneğin kendi istemi
#
# 40 tokenlık bir istem, her biri 16 tokenlık dört örnek, 16 tokenlık bloklar. Her örnek sıradan bir dizi sayılırsa
# `ceil(56 / 16) = 4` blok alır, dördü birden 16 blok eder. İstem için tutulanların dörtte üçü de aynı sayıların
# tekrarıdır.

# %%
BLOCK_SIZE, NUM_PROMPT, NUM_OUTPUT, NUM_SAMPLES = 16, 40, 16, 4
pool = BlockPool(num_blocks=20)
tables = [BlockTable(BLOCK_SIZE, pool) for _ in range(NUM_SAMPLES)]
for table in tables:
    table.append_slots(0, NUM_PROMPT + NUM_OUTPUT)
naive_blocks = pool.num_blocks - pool.num_free
print("blocks, one copy each:", naive_blocks)
assert naive_blocks == 16

# %% [markdown] en
# ## Better, and wrong: share the blocks and write
#
# Let the second sequence simply use the first one's blocks: copying a **block table** costs a few integers, copying
# KV costs megabytes. Here is what goes wrong, on a real `KVCache` with blocks of 4. The prompt has 6 tokens, so its
# last block is half full. Both sequences write their next token at position 6.

# %% [markdown] tr
# ## Daha iyi ama yanlış: blokları paylaşıp üzerine yazmak
#
# İkinci dizi, birincinin bloklarını olduğu gibi kullansın: bir **blok tablosunu** (block table) kopyalamak birkaç tam
# sayıya, KV'yi kopyalamak megabaytlara mal olur. Neyin ters gittiğini gerçek bir `KVCache` üzerinde, 4 tokenlık
# bloklarla görelim. İstem 6 token, yani son bloğunun yarısı dolu. İki dizi de sıradaki tokenını 6. konuma yazıyor.

# %%
cache = KVCache(num_layers=1, num_blocks=6, block_size=4, num_kv_heads=1, head_dim=1)


def write_kv(block_ids, position, value):
    cache.k[0, block_ids[position // 4], position % 4] = value


def read_kv(block_ids, num_tokens):
    return [int(cache.k[0, block_ids[p // 4], p % 4, 0, 0]) for p in range(num_tokens)]


first = [0, 1]
for position in range(6):
    write_kv(first, position, 10 + position)
second = list(first)  # the same blocks
write_kv(first, 6, 111)
write_kv(second, 6, 222)
print("first reads", read_kv(first, 7), " second reads", read_kv(second, 7))
assert read_kv(first, 7)[6] == 222

# %% [markdown] en
# The first sequence wrote 111 and now reads 222. Nothing crashes; it just continues somebody else's sentence. Sharing
# is safe only for blocks that **nobody writes**. Full blocks were never the problem, for they are only read. What
# matters is the block that is written next.
#
# ## Reference counts say who may write
#
# Each block has a **reference count** (`ref_cnt`): the number of block tables that hold it. The rule of
# **copy-on-write** is one sentence: *before writing into a block whose `ref_cnt` is above 1, take a free block, copy
# the old one's content into it, put it into your own table, and drop your reference to the old one.* This is the
# engine's own `BlockTable`:

# %% [markdown] tr
# Birinci dizi 111 yazdı ama şimdi 222 okuyor. Hiçbir şey çökmüyor; dizi yalnızca bir başkasının cümlesini sürdürüyor.
# Paylaşım yalnızca **kimsenin yazmadığı** bloklar için güvenlidir. Dolu bloklar hiç sorun olmadı, çünkü onlar
# yalnızca okunur; önemli olan, sırada yazılacak olan bloktur.
#
# ## Kimin yazabileceğini referans sayısı söyler
#
# Her bloğun bir **referans sayısı** (reference count, `ref_cnt`) vardır: onu tutan blok tablolarının sayısı.
# **Yazarken kopyalama** (copy-on-write) kuralı tek cümledir: *`ref_cnt` değeri 1'den büyük olan bir bloğa yazmadan
# önce boş bir blok alın, eskisinin içeriğini ona kopyalayın, kendi tablonuza onu koyun ve eskisine olan referansınızı
# bırakın.* Motorun kendi `BlockTable` sınıfıyla:

# %%
pool = BlockPool(num_blocks=20)
parent = BlockTable(BLOCK_SIZE, pool)
parent.append_slots(0, NUM_PROMPT)
samples = [parent] + [parent.fork() for _ in range(NUM_SAMPLES - 1)]
print("block table  ", parent.block_ids)
print("ref_cnt      ", [block.ref_cnt for block in parent.blocks])
assert [block.ref_cnt for block in parent.blocks] == [4, 4, 4]
assert pool.num_blocks - pool.num_free == 3

copies = []
for number, table in enumerate(samples):
    pairs = table.append_slots(NUM_PROMPT, NUM_PROMPT + 1)
    copies += pairs
    print(f"sample {number} writes position 40: copies {pairs}, table {table.block_ids}")
print("ref_cnt      ", [pool.blocks[b].ref_cnt for b in range(6)])
assert copies == [(2, 3), (2, 4), (2, 5)]
assert [pool.blocks[b].ref_cnt for b in range(6)] == [4, 4, 1, 1, 1, 1]

# %% [markdown] en
# Three copies, not four: the last of the four finds itself the only holder of block 2 and writes in place. The two
# full blocks stay shared for ever. When all four have their 16 tokens, they hold 10 blocks instead of 16.

# %% [markdown] tr
# Dört değil, üç kopya: dördüncü dizi 2. bloğu tutan tek dizi olarak kaldığını görür ve yerinde yazar. İki dolu blok
# ise sonuna kadar paylaşılır. Dört dizi de 16'şar token ürettiğinde 16 yerine 10 blok tutarlar.

# %%
for table in samples:
    table.append_slots(NUM_PROMPT + 1, NUM_PROMPT + NUM_OUTPUT)
shared_blocks = pool.num_blocks - pool.num_free
print("blocks, shared:", shared_blocks, "instead of", naive_blocks)
assert shared_blocks == 10
pool.check([table.blocks for table in samples])  # the conservation law: every reference is accounted for
for table in samples:
    table.release()
assert pool.num_free == pool.num_blocks

# %% [markdown] en
# ## Exercise: copy-on-write on plain lists
#
# Write the heart of `append_slots` yourself. The table has blocks for every position already, so nothing needs to be
# added: only copies.

# %% [markdown] tr
# ## Alıştırma: sade listelerle yazarken kopyalama
#
# `append_slots`'un özünü kendiniz yazın. Tabloda her konum için zaten bir blok var, yani eklenecek bir şey yok: iş
# yalnızca kopyalarda.

# %% [exercise] copy_on_write
def copy_on_write(block_ids, ref_cnt, free, start, end, block_size):
    """Make positions [start, end) of one block table writable.

    block_ids   list of int      the table; changed in place
    ref_cnt     int array [num_blocks]   tables that hold each block; changed in place
    free        list of int      free block ids, taken from the front; changed in place
    returns     list of (source, destination): block contents to copy before anything is written

    Only blocks that [start, end) touches are looked at, and of them only the shared ones are copied.
    (roughly 9 lines)
    """
    raise NotImplementedError


# %% [solution] copy_on_write
def copy_on_write(block_ids, ref_cnt, free, start, end, block_size):
    copies = []
    for index in range(start // block_size, -(-end // block_size)):
        old = block_ids[index]
        if ref_cnt[old] > 1:
            new = free.pop(0)
            block_ids[index] = new
            ref_cnt[old] -= 1
            ref_cnt[new] += 1
            copies.append((old, new))
    return copies


# %% [check] copy_on_write
def check_copy_on_write(copy_on_write):
    def case(ids, counts, free, start, end):
        ids, counts, free = list(ids), np.array(counts), list(free)
        return copy_on_write(ids, counts, free, start, end, 4), ids, counts.tolist(), free

    copies, ids, counts, free = case([0, 1], [2, 2, 0, 0], [2, 3], 6, 7)
    assert copies == [(1, 2)], f"writing position 6 must copy block 1 to block 2, and nothing else; you copied {copies}"
    assert ids == [0, 2], f"the table must hold the copy: [0, 2], not {ids}"
    assert counts[1] == 1, f"the writer no longer holds block 1: its ref_cnt must be 1, not {counts[1]}"
    assert counts[2] == 1, f"the copy is held once: its ref_cnt must be 1, not {counts[2]}"
    assert free == [3], f"block 2 was taken, so [3] is free; you left {free}"
    copies, ids, counts, free = case([0, 1], [2, 1, 0, 0], [2, 3], 6, 8)
    assert copies == [], f"block 1 has one holder and may be written in place; you copied {copies}"
    copies, ids, counts, free = case([4, 5, 6, 7], [0, 0, 0, 0, 3, 3, 3, 3], [0, 1, 2, 3], 5, 12)
    assert copies == [(5, 0), (6, 1)], f"positions 5 to 11 lie in the second and third block; you copied {copies}"
    assert ids == [4, 0, 1, 7], f"expected the table [4, 0, 1, 7], you left {ids}"


check("copy_on_write", check_copy_on_write, copy_on_write)


# %% [wrong] copy_on_write: must copy block 1 to block 2, and nothing else
def copy_on_write(block_ids, ref_cnt, free, start, end, block_size):  # copies the whole table
    copies = []
    for index, old in enumerate(block_ids):
        if ref_cnt[old] > 1:
            new = free.pop(0)
            block_ids[index] = new
            ref_cnt[old] -= 1
            ref_cnt[new] += 1
            copies.append((old, new))
    return copies


# %% [wrong] copy_on_write: its ref_cnt must be 1, not 2
def copy_on_write(block_ids, ref_cnt, free, start, end, block_size):  # keeps its reference to the old block
    copies = []
    for index in range(start // block_size, -(-end // block_size)):
        old = block_ids[index]
        if ref_cnt[old] > 1:
            new = free.pop(0)
            block_ids[index] = new
            ref_cnt[new] += 1
            copies.append((old, new))
    return copies


# %% [wrong] copy_on_write: may be written in place
def copy_on_write(block_ids, ref_cnt, free, start, end, block_size):  # copies private blocks too
    copies = []
    for index in range(start // block_size, -(-end // block_size)):
        old, new = block_ids[index], free.pop(0)
        block_ids[index] = new
        ref_cnt[old] -= 1
        ref_cnt[new] += 1
        copies.append((old, new))
    return copies


# %% [wrong] copy_on_write: lie in the second and third block
def copy_on_write(block_ids, ref_cnt, free, start, end, block_size):  # only the first block that is written
    old = block_ids[start // block_size]
    if ref_cnt[old] == 1:
        return []
    new = free.pop(0)
    block_ids[start // block_size] = new
    ref_cnt[old] -= 1
    ref_cnt[new] += 1
    return [(old, new)]


# %% [markdown] en
# ## In the engine: parallel sampling
#
# `n=4` asks for four continuations. The engine computes the prompt once, draws four tokens from its one row of
# logits, and forks. The first picture is the moment after: four tables, three blocks. The second is one step later.

# %% [markdown] tr
# ## Motorda: paralel örnekleme
#
# `n=4` dört devam ister. Motor istemi bir kez hesaplar, tek logit satırından dört token çeker, sonra çatallanır
# (fork). İlk resim hemen sonrasını gösteriyor: dört tablo, üç blok. İkincisi bir adım sonrası.

# %%
engine = Engine(EngineConfig("tiny", device="reference", num_threads=1, num_blocks=16, block_size=BLOCK_SIZE))
text = "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak. "
text += "First Citizen: You are all resolved"
prompt = engine.model.tokenizer.encode(text)[:NUM_PROMPT]
assert len(prompt) == NUM_PROMPT

engine.add_request(prompt, SamplingParams(n=NUM_SAMPLES, temperature=1, seed=7, max_tokens=NUM_OUTPUT))
engine.step()
stats = engine.stats()
print("blocks used", stats.num_blocks_used, " entries of all block tables", stats.num_block_references)
assert (stats.num_blocks_used, stats.num_block_references, stats.num_blocks_copied) == (3, 12, 0)
show(draw_blocks(engine), "four block tables over three blocks, each held four times")

# %%
engine.step()
stats = engine.stats()
print("blocks used", stats.num_blocks_used, " copied", stats.num_blocks_copied)
assert (stats.num_blocks_used, stats.num_blocks_shared, stats.num_blocks_copied) == (6, 2, 3)
show(draw_blocks(engine), "two blocks held four times, and a last block for each sample")

# %% [markdown] en
# The same numbers as in our small world: three copies, two blocks shared. Run to the end; the text of each sample is
# what it would have been alone, for that is the engine's law.

# %% [markdown] tr
# Küçük dünyamızdakiyle aynı sayılar: üç kopya, paylaşılan iki blok. Sonuna kadar çalıştıralım; her örneğin metni, tek
# başına üretilseydi ne olacaksa odur: motorun yasası budur.

# %%
peak = 0
while engine.has_unfinished():
    outputs = engine.step()
    peak = max(peak, engine.stats().num_blocks_used)
for choice in outputs[0].outputs:
    print(repr(choice.text))
print("most blocks used:", peak)
assert peak == shared_blocks == 10 and engine.stats().num_blocks_used == 0

# %% [markdown] en
# ## Beam search: fork and drop, every step
#
# Beam search keeps the four likeliest continuations. After each step some beams have several good successors (they
# fork) and others have none (they are dropped, and their references with them). With `ref_cnt` both are a handful of
# integer operations. Watch the blocks: the beams mostly descend from one parent a few tokens back, so they share
# nearly everything.

# %% [markdown] tr
# ## Işın araması: her adımda çatallanma ve bırakma
#
# Işın araması (beam search) en olası dört devamı tutar. Her adımdan sonra kimi ışınların birden çok iyi ardılı olur
# (çatallanırlar), kimilerinin hiç olmaz (referanslarıyla birlikte bırakılırlar). `ref_cnt` sayesinde ikisi de bir
# avuç tam sayı işlemidir. Bloklara bakın: ışınlar çoğunlukla birkaç token gerideki ortak bir atadan geldiği için
# hemen hemen her şeyi paylaşırlar.

# %%
copied_before = engine.stats().num_blocks_copied
engine.add_request(prompt, SamplingParams(use_beam_search=True, n=4, max_tokens=NUM_OUTPUT))
used, references = [], []
while engine.has_unfinished():
    outputs = engine.step()
    stats = engine.stats()
    if stats.num_requests_running:
        used.append(stats.num_blocks_used)
        references.append(stats.num_block_references)
        if len(used) == 14:
            picture = draw_blocks(engine)
saved = 1 - sum(used) / sum(references)
print("blocks used       ", used)
print("without sharing   ", references)
print(f"saved {saved:.0%}, copied {stats.num_blocks_copied - copied_before} blocks")
assert saved > 0.5
show(picture, "four beams that share most of their blocks")

# %% [markdown] en
# More than half of the blocks are saved, although a beam search copies a block now and then. In README, the table
# under "Sharing" measures the same on realistic lengths.
#
# ## What to read next
#
# - [`block_table.py`](../../minipaged/core/block_table.py): `append_slots`, `num_blocks_needed` (the scheduler asks
#   it first, so that copies are part of what a step may cost) and `fork`.
# - [`sequence_group.py`](../../minipaged/sequence_group.py) and [`beam_group.py`](../../minipaged/beam_group.py): who
#   forks, and in which order.
# - [`test_block_table.py`](../../tests/core/test_block_table.py): what the laws are, as tests.
#
# Next: [10, prefix caching](10_prefix_caching.ipynb), where blocks are shared by people who never met.

# %% [markdown] tr
# Işın araması arada bir blok kopyalasa da blokların yarısından fazlası tasarruf ediliyor. README'deki "Sharing"
# tablosu aynı ölçümü gerçekçi uzunluklarla verir.
#
# ## Sırada ne okumalı?
#
# - [`block_table.py`](../../minipaged/core/block_table.py): `append_slots`, `num_blocks_needed` (zamanlayıcı önce
#   bunu sorar; böylece kopyalar da adımın maliyetine girer) ve `fork`.
# - [`sequence_group.py`](../../minipaged/sequence_group.py) ve [`beam_group.py`](../../minipaged/beam_group.py): kim,
#   hangi sırayla çatallanır.
# - [`test_block_table.py`](../../tests/core/test_block_table.py): yasaların test hâli.
#
# Sonraki adım: [10, önek önbelleği](10_prefix_caching.ipynb). Orada blokları, birbirini hiç tanımayan kullanıcılar
# paylaşıyor.
