# %% [markdown] en
# # 14 · Paged attention in CUDA: from naive to split context
#
# **Goal.** Three kernels for the same attention of one new token over a paged cache: right, then coalesced, then with
# enough parallel work for a card. About 15 minutes. You need steps 04 (attention) and 13 (kernels and counters), and
# as there `pip install 'minipaged[cuda]' greenlet`, but no GPU.

# %% [markdown] tr
# # 14 · CUDA'da sayfalı dikkat: ilk akla gelenden bölünmüş bağlama
#
# **Amaç.** Tek bir yeni tokenın sayfalı önbellek üzerindeki aynı dikkati (attention) için üç çekirdek: önce doğru,
# sonra birleştirilmiş erişimli, en sonunda da bir karta yetecek kadar koşut iş çıkaran. Yaklaşık 15 dakika. Önkoşul:
# 04 (dikkat) ve 13 (çekirdekler ve sayaçlar); orada olduğu gibi `pip install 'minipaged[cuda]' greenlet`, ama GPU
# gerekmez.

# %%
import importlib.util
import math

import numpy as np

if missing := [name for name in ("numba_cuda", "cuda", "greenlet") if importlib.util.find_spec(name) is None]:
    raise ImportError(f"missing: {', '.join(missing)}; pip install 'minipaged[cuda]' greenlet (no GPU needed)")

from numba import cuda

from cuda_kernels import attention_plain
from cuda_kernels.kernel import Kernel, float32, int32, pointer
from cuda_kernels.toolchain.accesses import record_accesses
from cuda_kernels.toolchain.interpreter import run
from cuda_kernels.warp import warp_sum
from minipaged.view import draw_threads
from tutorials.course import check, show

floats, ints = pointer(float32), pointer(int32)

# %% [markdown] en
# ## The task
#
# One sequence with 256 tokens in its cache, 4 query heads, 2 KV heads of 32 values, blocks of 16 tokens in no
# particular order. The CUDA backend keeps K and V as `[block, kv_head, offset, head_dim]`. NumPy's answer, gathered
# and dense, is what all three kernels must reproduce.

# %% [markdown] tr
# ## Görev
#
# Önbelleğinde 256 token olan tek bir dizi, 4 sorgu başı, her biri 32 değerli 2 KV başı, 16 tokenlık ve karışık sıralı
# bloklar. CUDA arka ucu K ve V'yi `[block, kv_head, offset, head_dim]` düzeninde tutar. NumPy'nin toplayıp yoğun
# biçimde hesapladığı yanıtı, üç çekirdek de yeniden üretmek zorunda.

# %%
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, CONTEXT = 4, 2, 32, 16, 256
GROUP = HEADS // KV_HEADS
SCALE = np.float32(HEAD_DIM**-0.5)

rng = np.random.default_rng(14)
num_blocks = CONTEXT // BLOCK_SIZE
table = rng.permutation(num_blocks + 8)[:num_blocks].astype(np.int32)  # the block table
q = rng.standard_normal((HEADS, HEAD_DIM)).astype(np.float32)
shape = (2, num_blocks + 8, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
k_cache, v_cache = rng.standard_normal(shape).astype(np.float32)


def gather(cache):
    """[kv_head, position, head_dim], the blocks in the table's order."""
    return cache[table].transpose(1, 0, 2, 3).reshape(KV_HEADS, CONTEXT, HEAD_DIM)


def dense_attention():
    out = np.zeros_like(q)
    for head in range(HEADS):
        scores = gather(k_cache)[head // GROUP] @ q[head] * SCALE
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ gather(v_cache)[head // GROUP]
    return out


expected = dense_attention()

# %% [markdown] en
# ## Naive: one thread for each head
#
# The softmax is *online*: a running maximum, a running sum, and whatever was accumulated is scaled down when a larger
# score comes. So one pass over the keys is enough, and nothing of the length of the context has to be stored.

# %% [markdown] tr
# ## İlk akla gelen çözüm: her başa bir iş parçacığı
#
# Softmax *çevrimiçi* (online) hesaplanıyor: o ana kadarki en büyük değer ile o ana kadarki toplam tutulur; daha büyük
# bir skor geldiğinde o güne dek birikenler küçültülür. Böylece anahtarların üzerinden tek geçiş yeter, bağlam
# uzunluğunda hiçbir şey saklamak gerekmez.

# %%
def naive(q, k_cache, v_cache, table, out, context, scale):
    head = cuda.threadIdx.x
    if head >= HEADS:
        return
    acc = cuda.local.array(HEAD_DIM, float32)
    for d in range(HEAD_DIM):
        acc[d] = float32(0)
    maximum, total = float32(-math.inf), float32(0)
    for key in range(context):
        slot = (table[key // BLOCK_SIZE] * KV_HEADS + head // GROUP) * BLOCK_SIZE + key % BLOCK_SIZE
        score = float32(0)
        for d in range(HEAD_DIM):
            score += q[head * HEAD_DIM + d] * k_cache[slot * HEAD_DIM + d]
        score *= scale
        larger = max(maximum, score)
        keep, weight = math.exp(maximum - larger), math.exp(score - larger)
        maximum, total = larger, total * keep + weight
        for d in range(HEAD_DIM):
            acc[d] = acc[d] * keep + weight * v_cache[slot * HEAD_DIM + d]
    for d in range(HEAD_DIM):
        out[head * HEAD_DIM + d] = acc[d] / total


naive_kernel = Kernel("naive", naive, (floats, floats, floats, ints, floats, int32, float32), block=32)
out = np.zeros_like(q)
arguments = [q, k_cache, v_cache, table, out, CONTEXT, SCALE]
counters = run(naive_kernel, 1, arguments)
np.testing.assert_allclose(out, expected, atol=1e-5)
naive_sectors, naive_instructions = counters.load.sectors, counters.instructions
print("sectors", naive_sectors, " instructions of its only warp", naive_instructions)
assert naive_sectors == 33152
accesses = [access for access in record_accesses(naive_kernel, 1, arguments) if access.memory == "k_cache"]
show(draw_threads(accesses[:1], "One thread for each head"), "4 threads read one float each, from two rows of K")

# %% [markdown] en
# Right, and bad in two ways. 28 of the warp's 32 threads have nothing to do, and the four that work read a float at a
# time, two from each row of K: 33,152 sectors for K and V that would fit into 4,096.
#
# ## Better: one warp for each head
#
# Let thread `d` of a warp own value `d` of the head. Then the 32 threads read one row of K as 4 whole sectors,
# multiply, and add across the warp (`warp_sum`, by shuffles); the same for V. The kernel below can do a **part** of
# the context and leave its maximum, its sum and its accumulated values in `parts`; for now there is one part, the
# whole.

# %% [markdown] tr
# Doğru, ama iki bakımdan kötü. Warp'taki 32 iş parçacığının 28'inin yapacak işi yok; çalışan dördü de sayıları birer
# birer okuyor, K'nın her satırından ikisi birden: 4.096 sektöre sığacak K ve V için 33.152 sektör taşınıyor.
#
# ## Daha iyisi: her başa bir warp
#
# Warp'ın `d` numaralı iş parçacığı, başın `d` numaralı değerini üstlensin. O zaman 32 iş parçacığı K'nın bir satırını
# 4 tam sektör olarak okur, çarpar ve warp boyunca toplar (`warp_sum`, karıştırma (shuffle) komutlarıyla); V için de
# aynısı. Aşağıdaki çekirdek bağlamın bir **parçasını** işleyip en büyük değeri, toplamı ve biriken değerleri `parts`
# içinde bırakabilir; şimdilik tek parça var, o da bağlamın bütünü.

# %%
def attend_part(q, k_cache, v_cache, table, parts, context, part_size, scale):
    head, part, d = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    query = q[head * HEAD_DIM + d] * scale
    acc, maximum, total = float32(0), float32(-math.inf), float32(0)
    key, end = part * part_size, min(context, (part + 1) * part_size)
    while key < end:
        slot = (table[key // BLOCK_SIZE] * KV_HEADS + head // GROUP) * BLOCK_SIZE + key % BLOCK_SIZE
        score = warp_sum(query * k_cache[slot * HEAD_DIM + d])
        larger = max(maximum, score)
        keep, weight = math.exp(maximum - larger), math.exp(score - larger)
        acc = acc * keep + weight * v_cache[slot * HEAD_DIM + d]
        maximum, total = larger, total * keep + weight
        key += 1
    cell = (head * cuda.gridDim.y + part) * (HEAD_DIM + 2)
    parts[cell + d] = acc
    if d == 0:
        parts[cell + HEAD_DIM] = maximum
        parts[cell + HEAD_DIM + 1] = total


part_kernel = Kernel("attend_part", attend_part, (floats,) * 3 + (ints, floats, int32, int32, float32), block=32)


def attend(num_parts):
    """What each part leaves, [heads, num_parts, head_dim + 2], and the counters."""
    parts = np.zeros((HEADS, num_parts, HEAD_DIM + 2), np.float32)
    part_size = -(-CONTEXT // num_parts)
    grid = (HEADS, num_parts)
    return parts, run(part_kernel, grid, [q, k_cache, v_cache, table, parts, CONTEXT, part_size, SCALE])


parts, counters = attend(1)
whole = parts[:, 0]
np.testing.assert_allclose(whole[:, :HEAD_DIM] / whole[:, HEAD_DIM + 1 :], expected, atol=1e-5)
whole_instructions = counters.instructions / HEADS
print("sectors", counters.load.sectors, " instructions of each warp", round(whole_instructions))
assert counters.load.sectors == 9232
arguments = [q, k_cache, v_cache, table, parts.copy(), CONTEXT, CONTEXT, SCALE]
accesses = record_accesses(part_kernel, (HEADS, 1), arguments)
accesses = [access for access in accesses if access.memory == "k_cache"]
show(draw_threads(accesses[:1], "One warp for each head"), "32 threads read one row of K, four whole sectors")
assert whole_instructions < naive_instructions / 2

# %% [markdown] en
# 9,232 sectors instead of 33,152. (Two query heads read the same KV head, so K and V are read twice; on a card the
# second reading mostly hits a cache. The engine's kernels take a KV head's whole group at once.)
#
# The pain that is left: the launch has **four** warps, one for each head. A large card runs several thousand at a
# time. One user with a long context would leave nearly all of it idle, and wait for one warp to walk along the
# context.
#
# ## New: split the context, then combine
#
# Let several warps share the context of a head, a part each. What a part leaves is enough to put the parts together:

# %% [markdown] tr
# 33.152 yerine 9.232 sektör. (İki sorgu başı aynı KV başını okuduğu için K ve V iki kez okunuyor; kartta ikinci okuma
# çoğunlukla önbellekten gelir. Motorun çekirdekleri bir KV başının bütün grubunu birlikte işler.)
#
# Kalan dert: başlatmada yalnızca **dört** warp var, her başa bir tane. Büyük bir kart aynı anda birkaç bin warp
# yürütür. Uzun bağlamlı tek kullanıcı kartın neredeyse tamamını boş bırakır ve tek bir warp'ın bağlam boyunca
# yürümesini bekler.
#
# ## Yeni çözüm: bağlamı böl, sonra birleştir
#
# Bir başın bağlamını birkaç warp paylaşsın, her birine bir parça düşsün. Parçanın bıraktıkları, parçaları
# birleştirmeye yeter:

# %%
NUM_PARTS = 8
parts, counters = attend(NUM_PARTS)
split_instructions = counters.instructions / HEADS / NUM_PARTS
print(HEADS * NUM_PARTS, "warps, instructions of each:", round(split_instructions))
assert split_instructions < whole_instructions / 7
print("maxima of the parts of head 0:", parts[0, :, HEAD_DIM].round(2))

# %% [markdown] en
# 32 warps, each with an eighth of the walk. But the parts cannot simply be added: each was scaled by its own maximum.
#
# ## Exercise: combine the parts
#
# Part `i` holds `acc[i] = sum of exp(s - m[i]) * v` and `total[i] = sum of exp(s - m[i])` over its own keys. Bring
# all to one common maximum first.

# %% [markdown] tr
# Her biri yolun sekizde birini yürüyen 32 warp. Ama parçalar öylece toplanamaz: her biri kendi en büyük değerine göre
# ölçeklenmiştir.
#
# ## Alıştırma: parçaları birleştirin
#
# `i` numaralı parça, kendi anahtarları üzerinden `acc[i] = sum of exp(s - m[i]) * v` ve `total[i] = sum of exp(s -
# m[i])` değerlerini tutar. Önce hepsini ortak bir en büyük değere getirin.

# %% [exercise] combine
def combine(maxima, totals, accs):
    """The attention of one head from the parts of its context.

    maxima   float32 [P]      largest score of each part; -inf for a part without keys
    totals   float32 [P]      sum of exp(score - maxima[i]) over the part's keys
    accs     float32 [P, D]   sum of exp(score - maxima[i]) * value
    returns  float32 [D]      softmax over all keys, times values; at least one part has keys
    NumPy:   a factor for each part, two sums, a division (roughly 3 lines)
    """
    raise NotImplementedError


# %% [solution] combine
def combine(maxima, totals, accs):
    factors = np.exp(maxima - maxima.max())
    return (factors[:, None] * accs).sum(0) / (factors * totals).sum()


# %% [check] combine
def check_combine(combine):
    rng = np.random.default_rng(2)

    def case(scores, sizes):
        values = rng.standard_normal((len(scores), 5)).astype(np.float32)
        maxima, totals, accs = [], [], []
        cuts = np.cumsum(sizes)[:-1]
        for part, value in zip(np.split(scores, cuts), np.split(values, cuts), strict=True):
            maximum = part.max() if len(part) else -np.inf
            weights = np.exp(part - maximum)
            maxima.append(maximum)
            totals.append(weights.sum())
            accs.append(weights @ value)
        weights = np.exp(scores - scores.max())
        with np.errstate(all="ignore"):
            found = combine(*(np.array(each, np.float32) for each in (maxima, totals, accs)))
        return np.asarray(found), weights / weights.sum() @ values

    def expect(scores, sizes, otherwise):
        found, wanted = case(scores.astype(np.float32), sizes)
        assert found.shape == (5,), f"one value for each of 5 dimensions: shape (5,), not {found.shape}"
        assert np.allclose(found, wanted, atol=1e-5), f"{otherwise} (found {found[0]:.3f}, expected {wanted[0]:.3f})"

    expect(np.zeros(8), [4, 4], "all scores are equal, so the result is the mean of all values")
    expect(np.zeros(8), [6, 2], "a part with more keys must weigh more: divide once, by the sum over all parts")
    expect(np.arange(8.0), [4, 4], "the maxima differ: scale accs AND totals by exp(maxima[i] - the largest)")
    expect(np.arange(8.0) * 40, [4, 4], "with large scores exp(maxima) overflows: subtract the largest maximum first")
    expect(np.arange(8.0), [4, 0, 4], "a part without keys has the maximum -inf and must not count")


check("combine", check_combine, combine)


# %% [wrong] combine: a part with more keys must weigh more
def combine(maxima, totals, accs):  # the mean of the parts' results
    return (accs / totals[:, None]).mean(0)


# %% [wrong] combine: scale accs AND totals
def combine(maxima, totals, accs):  # adds what has different scales
    return accs.sum(0) / totals.sum()


# %% [wrong] combine: subtract the largest maximum first
def combine(maxima, totals, accs):  # undoes each part's scale; overflows
    factors = np.exp(maxima)
    return (factors[:, None] * accs).sum(0) / (factors * totals).sum()


# %% [wrong] combine: scale accs AND totals
def combine(maxima, totals, accs):  # forgets the totals
    factors = np.exp(maxima - maxima.max())
    return (factors[:, None] * accs).sum(0) / totals.sum()


# %% [markdown] en
# ## The same as a kernel
#
# One warp for each head folds its parts in order. The order matters: floating-point sums depend on it, and the engine
# promises that a request's bits do not depend on how the work was split. (Its kernels keep that promise by folding
# *every* context in the same chunks, split or not; ours here do not.)

# %% [markdown] tr
# ## Aynısı, çekirdek olarak
#
# Her başın bir warp'ı, parçaları sırayla katlar. Sıra önemlidir: kayan noktalı toplamlar sıraya bağlıdır, motor ise
# bir isteğin bitlerinin işin nasıl bölündüğüne bağlı olmayacağına söz verir. (Motorun çekirdekleri bu sözü, bölünse
# de bölünmese de *her* bağlamı aynı parçalarla katlayarak tutar; buradakiler tutmaz.)

# %%
def fold_parts(parts, out, num_parts):
    head, d = cuda.blockIdx.x, cuda.threadIdx.x
    acc, maximum, total = float32(0), float32(-math.inf), float32(0)
    for part in range(num_parts):
        cell = (head * num_parts + part) * (HEAD_DIM + 2)
        of_part = parts[cell + HEAD_DIM]
        larger = max(maximum, of_part)
        keep, take = math.exp(maximum - larger), math.exp(of_part - larger)
        acc = acc * keep + parts[cell + d] * take
        maximum, total = larger, total * keep + parts[cell + HEAD_DIM + 1] * take
    out[head * HEAD_DIM + d] = acc / total


out = np.zeros_like(q)
counters = run(Kernel("fold_parts", fold_parts, (floats, floats, int32), block=32), HEADS, [parts, out, NUM_PARTS])
np.testing.assert_allclose(out, expected, atol=1e-5)
walk = split_instructions + counters.instructions / HEADS
print(f"instructions one after the other: whole {whole_instructions:.0f}, split and folded {walk:.0f}")
assert walk < whole_instructions / 5

# %% [markdown] en
# The longest walk is less than a fifth of what it was, with eight times as many warps at work.
#
# ## The engine's own
#
# `attention_plain` is the one to be read first: one block of 128 threads for a query head, tiles of 32 keys in shared
# memory, prefill and decode alike, windows, int8 caches. It agrees with ours:

# %% [markdown] tr
# En uzun yürüyüş eskisinin beşte birinden kısa, çalışan warp sayısı ise sekiz katı.
#
# ## Motorun kendisininki
#
# İlk okunacak olan `attention_plain`'dir: her sorgu başına 128 iş parçacıklı bir blok, paylaşımlı bellekte (shared
# memory) 32 anahtarlık karolar; ön doldurma ile çözme aynı çekirdekte, pencereler ve int8 önbellekler de var.
# Bizimkiyle aynı sonucu veriyor:

# %% [varies]
plain = attention_plain.build(HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
out, none = np.zeros((1, HEADS, HEAD_DIM), np.float32), np.zeros(1, np.float32)
sequences, positions = np.zeros(1, np.int32), np.array([CONTEXT - 1], np.int32)
arguments = [q, k_cache, v_cache, none, none, table[None], sequences, positions, out]
grid, _ = attention_plain.launch_dims(1, HEADS)
counters = run(plain, grid, [*arguments, num_blocks, attention_plain.NO_WINDOW, SCALE])
np.testing.assert_allclose(out[0], expected, atol=1e-5)
print("sectors", counters.load.sectors)
assert counters.load.sectors < 9232

# %% [markdown] en
# ## What to read next
#
# - [`attention_plain.py`](../../cuda_kernels/attention_plain.py), whose drawing shows the three phases of a tile.
# - [`attention_decode.py`](../../cuda_kernels/attention_decode.py): a group of heads at once, on tensor cores (step
#   15), split or not; [`attention_reduce.py`](../../cuda_kernels/attention_reduce.py): your exercise.
# - [`plan.py`](../../minipaged/ops/cuda/plan.py): when a launch is split (few sequences, contexts of more than 512
#   tokens).
#
# Next: [15, products on tensor cores](15_tensor_cores.ipynb).

# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`attention_plain.py`](../../cuda_kernels/attention_plain.py): içindeki çizim bir karonun üç evresini gösterir.
# - [`attention_decode.py`](../../cuda_kernels/attention_decode.py): bir baş grubunu birlikte, tensör çekirdeklerinde
#   işler (adım 15), bölerek ya da bölmeden; [`attention_reduce.py`](../../cuda_kernels/attention_reduce.py):
#   alıştırmanız.
# - [`plan.py`](../../minipaged/ops/cuda/plan.py): bir başlatmanın ne zaman bölündüğü (az sayıda dizi, 512 tokendan
#   uzun bağlamlar).
#
# Sonraki adım: [15, tensör çekirdeklerinde çarpım](15_tensor_cores.ipynb).
