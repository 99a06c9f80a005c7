# %% [markdown] en
# # 03 · Block tables, slots and a paged KV cache
#
# **Goal.** Turn the integers of step 02 into memory: store keys and values in blocks with NumPy, find the **slot** of
# every token, and read a sequence back in order. About 12 minutes.
#
# The physical memory of one layer is a single array, `[num_blocks, block_size, num_kv_heads, head_dim]`. Number its
# slots through, block after block; then the slot of a token is
#
# $$\text{slot} = \text{block id} \times \text{block size} + \text{offset}$$
#
# and the list of slots into which a step writes is its **slot mapping**.
# %% [markdown] tr
# # 03 · Blok tabloları, yuvalar ve sayfalı bir KV önbelleği
#
# **Amaç.** 02. adımın tamsayılarını belleğe dönüştürmek: Anahtarları ve değerleri NumPy ile bloklarda saklamak, her
# tokenın **yuvasını** (slot) bulmak ve bir diziyi sırasıyla geri okumak. Yaklaşık 12 dakika.
#
# Bir katmanın fiziksel belleği tek bir NumPy dizisidir: `[num_blocks, block_size, num_kv_heads, head_dim]`. Yuvaları
# blok blok ilerleyerek baştan sona numaralayın. O zaman bir tokenın yuvası
#
# $$\text{slot} = \text{block id} \times \text{block size} + \text{offset}$$
#
# olur. Bir adımda yazılan yuvaların listesine de **yuva eşlemesi** (slot mapping) denir.

# %%
import numpy as np

from minipaged.core.block_pool import BlockPool
from minipaged.core.block_table import BlockTable
from tutorials.course import show
from tutorials.course.drawing import draw_grid

BLOCK_SIZE = 4
pool = BlockPool(num_blocks=6)
table = BlockTable(BLOCK_SIZE, pool)
other = BlockTable(BLOCK_SIZE, pool)
table.append_slots(0, 4)
other.append_slots(0, 4)
table.append_slots(4, 10)

memory = {f"block {block_id}": [None] * BLOCK_SIZE for block_id in range(6)}
for position in range(10):
    block_id, offset = divmod(table.slot(position), BLOCK_SIZE)
    memory[f"block {block_id}"][offset] = (0, position)
for position in range(4):
    block_id, offset = divmod(other.slot(position), BLOCK_SIZE)
    memory[f"block {block_id}"][offset] = (1, position)
show(draw_grid("Where the tokens lie", memory, cell=30, note="two sequences; the numbers are positions"))
print("block table", table.block_ids, "slot of position 6:", table.slot(6))
assert table.block_ids == [0, 2, 3] and table.slot(6) == 10

# %% [markdown] en
# Position 6 lies in the second block of the table, which is block 2, at offset 2: slot 10.
#
# ## The naive version
#
# Without blocks each sequence has an array of its own, and every new token makes it longer:
# %% [markdown] tr
# 6 numaralı konum, tablonun ikinci bloğunda yani 2 numaralı blokta, 2 numaralı ofsettedir: yuva 10.
#
# ## İlk akla gelen çözüm
#
# Bloklar olmadan her dizinin kendi NumPy dizisi vardır ve her yeni token onu uzatır:

# %%
rng = np.random.default_rng(0)
NUM_KV_HEADS, HEAD_DIM = 2, 32

keys = np.empty((0, NUM_KV_HEADS, HEAD_DIM), np.float32)
copied = 0
for _ in range(512):
    new = rng.standard_normal((1, NUM_KV_HEADS, HEAD_DIM), np.float32)
    copied += keys.nbytes  # what there was moves to new memory
    keys = np.concatenate([keys, new])
print(f"stored {keys.nbytes / 2**10:.0f} KiB, copied {copied / 2**10:.0f} KiB, ratio {copied / keys.nbytes:.1f}")
assert (keys.nbytes, copied) == (128 * 2**10, 32704 * 2**10)

# %% [markdown] en
# ## What hurts
#
# To store 128 KiB we copied 32704 KiB, and that is one layer's keys for one sequence. The work grows with the square
# of the length. Reserving the longest length in advance avoids the copies, but step 01 showed its price.
#
# ## The new version
#
# Write each token into its slot, once, and never move it. A step writes tokens of many sequences at once: their slots
# are one array of integers, and NumPy's fancy indexing does the rest. To read a sequence, take the blocks that its
# table names.
# %% [markdown] tr
# ## Sorun nerede?
#
# 128 KiB saklamak için 32704 KiB kopyaladık; üstelik bu, tek bir dizinin tek bir katmanındaki anahtarlar için. İş,
# uzunluğun karesiyle büyüyor. En uzun boyu baştan ayırmak kopyaları önler, ama bunun bedelini 01. adımda gördük.
#
# ## Yeni çözüm
#
# Her tokenı kendi yuvasına bir kez yazın ve bir daha yerinden oynatmayın. Bir adımda birçok dizinin tokenları
# birlikte yazılır: Yuvalar tek bir tamsayı dizisidir, gerisini NumPy'ın gelişmiş indekslemesi (fancy indexing)
# halleder. Bir diziyi okumak için de tablosunun gösterdiği blokları alın.

# %% [exercise] slot_mapping
def slot_mapping(block_ids, block_size, start, end):
    """Slots of the positions from `start` to `end` (excluded) of one sequence (roughly 2 lines).

    Args:
        block_ids: list of ints, the sequence's block table.
        block_size: slots of a block.
        start, end: ints, 0 <= start <= end.

    Returns:
        int64 array [end - start].
    """
    raise NotImplementedError

# %% [solution] slot_mapping
def slot_mapping(block_ids, block_size, start, end):
    positions = np.arange(start, end)
    return np.array(block_ids)[positions // block_size] * block_size + positions % block_size

# %% [check] slot_mapping
from tutorials.course import check


def examine_slot_mapping(slot_mapping):
    table = BlockTable(4, pool)
    for block_ids, start, end in ([5], 0, 3), ([0, 2, 3], 0, 10), ([7, 1, 4], 3, 9):
        table.block_ids = block_ids  # the engine's BlockTable says what is right
        expected = [table.slot(position) for position in range(start, end)]
        found = slot_mapping(block_ids, 4, start, end)
        assert isinstance(found, np.ndarray), f"slot_mapping returns a {type(found).__name__}; it must be an array."
        where = f"block table {block_ids}, positions {start} to {end}"
        assert found.tolist() == expected, f"{where}: the slots are {found.tolist()}; they must be {expected}."


check("slot_mapping", examine_slot_mapping, slot_mapping)

# %% [wrong] slot_mapping: the slots are \[0, 1, 2\]; they must be \[20, 21, 22\]
def slot_mapping(block_ids, block_size, start, end):
    return np.arange(start, end)  # positions, not slots

# %% [wrong] slot_mapping: the slots are \[28, 29, 30, 31, 4, 5\]; they must be \[31, 4, 5, 6, 7, 16\]
def slot_mapping(block_ids, block_size, start, end):
    slots = [block_id * block_size + offset for block_id in block_ids for offset in range(block_size)]
    return np.array(slots[: end - start])  # as if every step began at position 0

# %% [wrong] slot_mapping: the slots are \[5, 6, 7\]; they must be \[20, 21, 22\]
def slot_mapping(block_ids, block_size, start, end):
    positions = np.arange(start, end)
    return np.array(block_ids)[positions // block_size] + positions % block_size  # a block is more than one slot

# %% [markdown] en
# Now the other way: from memory back to the sequence. The last block is partly filled, and what else it holds (the
# leavings of an earlier sequence, even NaN) must not appear.
# %% [markdown] tr
# Şimdi ters yönde, bellekten diziye. Son bloğun yalnızca bir kısmı doludur; içindeki başka şeyler (önceki bir diziden
# kalanlar, hatta NaN) sonuca karışmamalıdır.

# %% [exercise] gather
def gather(cache, block_ids, num_tokens):
    """The keys (or values) of a sequence, in the order of its tokens (roughly 2 lines).

    Args:
        cache: float32 array [num_blocks, block_size, num_kv_heads, head_dim].
        block_ids: list of ints, the sequence's block table.
        num_tokens: how many tokens it has; its last block may hold more slots than that.

    Returns:
        float32 array [num_tokens, num_kv_heads, head_dim].
    """
    raise NotImplementedError

# %% [solution] gather
def gather(cache, block_ids, num_tokens):
    blocks = cache[block_ids]  # [len(block_ids), block_size, num_kv_heads, head_dim]
    return blocks.reshape(-1, *cache.shape[2:])[:num_tokens]

# %% [check] gather
from minipaged.ops.reference.kv import write_kv


def examine_gather(gather):
    for block_ids, num_tokens in ([1], 4), ([4, 0, 2], 12), ([4, 0, 2], 10):
        k_cache = np.full((6, 4, NUM_KV_HEADS, HEAD_DIM), np.nan, np.float32)  # nothing was written yet
        v_cache = k_cache.copy()
        k, v = np.random.default_rng(1).standard_normal((2, num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float32)
        slots = np.array([block_ids[p // 4] * 4 + p % 4 for p in range(num_tokens)])
        write_kv(k, v, k_cache, v_cache, slots)
        found = gather(k_cache, block_ids, num_tokens)
        where = f"block table {block_ids}, {num_tokens} tokens"
        assert found.shape == k.shape, f"{where}: the shape is {found.shape}; it must be {k.shape}."
        assert not np.isnan(found).any(), f"{where}: there is NaN, from a slot that belongs to nobody."
        assert (found == k).all(), f"{where}: token {int((found != k).any((1, 2)).argmax())} is not the one written there."


check("gather", examine_gather, gather)

# %% [wrong] gather: block table \[4, 0, 2\], 10 tokens: the shape is \(12, 2, 32\)
def gather(cache, block_ids, num_tokens):
    return cache[block_ids].reshape(-1, *cache.shape[2:])  # the whole last block

# %% [wrong] gather: the shape is \(1, 4, 2, 32\); it must be \(4, 2, 32\)
def gather(cache, block_ids, num_tokens):
    return cache[block_ids][:num_tokens]  # blocks, not tokens

# %% [wrong] gather: token 0 is not the one written there
def gather(cache, block_ids, num_tokens):
    return cache[sorted(block_ids)].reshape(-1, *cache.shape[2:])[:num_tokens]

# %% [markdown] en
# ## In the engine
#
# The engine does the same, in every layer. Let it compute a prompt alone, and then in a pool where other requests have
# scattered the blocks. The block tables differ, the keys do not:
# %% [markdown] tr
# ## Motorda
#
# Motor aynısını her katmanda yapar. Bir istemi (prompt) önce tek başına, sonra blokları başka isteklerce dağıtılmış
# bir havuzda hesaplatalım. Blok tabloları farklı, anahtarlar aynı:

# %%
from minipaged import SamplingParams
from minipaged.config import EngineConfig
from minipaged.engine import Engine
from minipaged.view import draw_blocks

PROMPT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate."


def keys_in_engine(*others):
    engine = Engine(EngineConfig(model="tiny", device="reference", num_blocks=32, block_size=4))
    for text in others:
        engine.add_request(text, SamplingParams(max_tokens=20, temperature=0), request_id=text[:6])
    for _ in range(3 if others else 0):
        engine.step()  # the others are under way and own blocks
    engine.add_request(PROMPT, SamplingParams(max_tokens=20, temperature=0), request_id="sonnet")
    for _ in range(5):
        engine.step()
    request = engine.scheduler.requests["sonnet"]
    k_cache, _ = engine.runner.kv_cache.layer(0)
    blocks = k_cache[request.block_table.block_ids].reshape(-1, *k_cache.shape[2:])
    return engine, request.block_table.block_ids, blocks[: request.num_computed_tokens]


_, alone_ids, alone = keys_in_engine()
engine, ids, together = keys_in_engine("ROMEO: But soft", "First Citizen: Before we proceed")
show(draw_blocks(engine.scheduler, "Three requests in one pool"), "the new blocks of three requests interleave")
print("alone   ", alone_ids)
print("together", ids)
print("largest difference of a key:", "below 1e-4" if np.abs(alone - together).max() < 1e-4 else "too large")
assert alone_ids != ids and np.abs(alone - together).max() < 1e-4

# %% [markdown] en
# ## What to read next
#
# - [`kv_cache.py`](../../minipaged/kv_cache.py): the physical memory; in it the heads come before the blocks, the
#   index order is the same.
# - [`runner.py`](../../minipaged/runner.py): `build_batch` makes the slot mapping of a whole step.
# - [`kv.py`](../../minipaged/ops/reference/kv.py): `write_kv`, four lines.
#
# In step 04 attention reads these keys and values.
# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`kv_cache.py`](../../minipaged/kv_cache.py): fiziksel bellek. Orada başlar bloklardan önce gelir, indeks sırası
#   ise aynıdır.
# - [`runner.py`](../../minipaged/runner.py): bütün bir adımın yuva eşlemesini `build_batch` kurar.
# - [`kv.py`](../../minipaged/ops/reference/kv.py): `write_kv`, dört satır.
#
# 04. adımda dikkat (attention) bu anahtarları ve değerleri okuyacak.
