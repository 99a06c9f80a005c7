# %% [markdown] en
# # 15 · Products on tensor cores
#
# **Goal.** One instruction that multiplies a 16 x 16 piece of a weight with 8 tokens, and the order of the weight in
# memory that feeds it. About 14 minutes. You need step 13 (kernels and counters), and as there `pip install
# 'minipaged[cuda]' greenlet`, but no GPU.

# %% [markdown] tr
# # 15 · Tensör çekirdeklerinde çarpım
#
# **Amaç.** Bir ağırlığın 16 x 16'lık parçasını 8 tokenla çarpan tek bir komut ve ağırlığın, onu besleyecek biçimde
# belleğe dizilmesi. Yaklaşık 14 dakika. Önkoşul: 13 (çekirdekler ve sayaçlar); orada olduğu gibi `pip install
# 'minipaged[cuda]' greenlet`, ama GPU gerekmez.

# %%
import importlib.util

import numpy as np

if missing := [name for name in ("numba_cuda", "cuda", "greenlet") if importlib.util.find_spec(name) is None]:
    raise ImportError(f"missing: {', '.join(missing)}; pip install 'minipaged[cuda]' greenlet (no GPU needed)")

from numba import cuda

from cuda_kernels.intrinsics import half_to_f32, ldg128, mma_m16n8k16_f16
from cuda_kernels.kernel import Kernel, float32, int32, pointer, uint16, uint32
from cuda_kernels.toolchain.examples import example
from cuda_kernels.toolchain.interpreter import run
from tutorials.course import check, show
from tutorials.course.step15 import examine_pack_fragments, fragments, place

halves, words, floats = pointer(uint16), pointer(uint32), pointer(float32)

# %% [markdown] en
# ## Naive: one thread for each output
#
# `out = x @ w.T` for 8 tokens `x` and 16 rows of a weight `w`, 128 columns each, all float16, sums in float32. 128
# outputs, 128 threads, and each walks along its row and its token.

# %% [markdown] tr
# ## İlk akla gelen çözüm: her çıktıya bir iş parçacığı
#
# 8 token `x` ve bir ağırlığın 16 satırı `w` için `out = x @ w.T`; her birinde 128 sütun var, hepsi float16, toplamlar
# float32. 128 çıktı, 128 iş parçacığı; her biri kendi satırı ile kendi tokenı boyunca yürür.

# %%
TOKENS, ROWS, COLUMNS = 8, 16, 128
rng = np.random.default_rng(15)
x = rng.standard_normal((TOKENS, COLUMNS)).astype(np.float16)
w = rng.standard_normal((ROWS, COLUMNS)).astype(np.float16)
expected = x.astype(np.float32) @ w.astype(np.float32).T


def naive(x, w, out, columns):
    token, row = cuda.threadIdx.x // ROWS, cuda.threadIdx.x % ROWS
    total = float32(0)
    for k in range(columns):
        total += half_to_f32(x[token * columns + k]) * half_to_f32(w[row * columns + k])
    out[token * ROWS + row] = total


out = np.zeros((TOKENS, ROWS), np.float32)
naive_kernel = Kernel("naive_product", naive, (halves, halves, floats, int32), block=128)
counters = run(naive_kernel, 1, [x.view(np.uint16), w.view(np.uint16), out, COLUMNS])
np.testing.assert_allclose(out, expected, atol=1e-4)
naive_instructions = counters.instructions
print("instructions by warps:", naive_instructions)

# %% [markdown] en
# 16,384 multiplications take thousands of instructions: loads, conversions, loop counters, and one multiplication
# with addition for each thread and column.
#
# ## New: the warp multiplies matrices
#
# A **tensor core** executes `mma.m16n8k16`: a warp's 32 lanes together compute `C[16, 8] += A[16, 16] @ B[16, 8]`. No
# lane holds a matrix. Each holds a few words of it, its **fragment**, two float16 a word, in a fixed order. Here is
# who holds what of `A`: each cell is a pair of neighbouring columns, the number is the lane, the colour is the word
# (0 to 3).

# %% [markdown] tr
# 16.384 çarpma binlerce komut tutuyor: yüklemeler, dönüştürmeler, döngü sayaçları ve her iş parçacığıyla her sütun
# için bir çarpıp toplama.
#
# ## Yeni çözüm: matrisleri warp çarpar
#
# **Tensör çekirdeği** (tensor core) `mma.m16n8k16` komutunu yürütür: warp'ın 32 şeridi (lane) birlikte `C[16, 8] +=
# A[16, 16] @ B[16, 8]` işlemini yapar. Hiçbir şerit bir matrisin bütününü tutmaz; her birinde onun bir **parçası**
# (fragment), değişmez bir sıraya göre dizilmiş birkaç sözcük (word) durur, her sözcükte iki float16 vardır. `A`'nın
# neresini kimin tuttuğu aşağıda: her hücre komşu iki sütundur, sayı şeridi, renk de sözcüğü (0'dan 3'e) gösterir.

# %%
def draw_fragment():
    colors = ("#8ecae6", "#ffd166", "#95d5b2", "#f4a6a6")
    cells, font = [], 'font-family="sans-serif"'
    for lane in range(32):
        for word in range(4):
            row, column = place(lane, word)
            left, top = 22 * column, 20 * row
            cells.append(f'<rect x="{left}" y="{top}" width="43" height="19" fill="{colors[word]}"/>')
            cells.append(f'<text x="{left + 22}" y="{top + 14}" text-anchor="middle" font-size="12" {font}>{lane}</text>')
    size = 'width="352" height="320" viewBox="0 0 352 320"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(cells)}</svg>'


show(draw_fragment(), "lane 4g + t holds rows g and g + 8, columns 2t, 2t + 1, 2t + 8 and 2t + 9")
assert place(5, 0) == (1, 2) and place(5, 1) == (9, 2) and place(5, 2) == (1, 10)


# %%
def natural(x, w, out, row_words):
    """x and w as words of two float16; both in their natural order, row after row."""
    g, t = cuda.threadIdx.x // 4, cuda.threadIdx.x % 4
    c0, c1, c2, c3 = float32(0), float32(0), float32(0), float32(0)
    k = t
    while k < row_words:
        a0, a1 = w[g * row_words + k], w[(g + 8) * row_words + k]
        a2, a3 = w[g * row_words + k + 4], w[(g + 8) * row_words + k + 4]
        b0, b1 = x[g * row_words + k], x[g * row_words + k + 4]  # token g
        c0, c1, c2, c3 = mma_m16n8k16_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
        k += 8
    out[2 * t * ROWS + g], out[(2 * t + 1) * ROWS + g] = c0, c1  # rows g and g + 8 of tokens 2t and 2t + 1
    out[2 * t * ROWS + g + 8], out[(2 * t + 1) * ROWS + g + 8] = c2, c3


out = np.zeros((TOKENS, ROWS), np.float32)
natural_kernel = Kernel("natural_product", natural, (words, words, floats, int32), min_cc=(8, 0), block=32)
counters = run(natural_kernel, 1, [x.view(np.uint32), w.view(np.uint32), out, COLUMNS // 2])
np.testing.assert_allclose(out, expected, atol=1e-4)
print("tensor-core instructions:", counters.by_kind["tensor core"], " all:", counters.instructions)
load = counters.load
print("loads:", load.requests, " sectors:", load.sectors, f" efficiency {load.efficiency:.0%}")
assert counters.by_kind["tensor core"] == COLUMNS // 16 == 8
assert naive_instructions > 50 * counters.instructions
assert (counters.load.requests, counters.load.sectors, counters.load.efficiency) == (48, 384, 0.5)

# %% [markdown] en
# More than 50 times fewer instructions. Now loading is the bottleneck, and half of what is loaded is wasted: for word
# 0 of `A` a warp reads 16 bytes of each of 8 rows, half a sector each.
#
# ## Exercise: store the weight as the lanes want it
#
# Weights never change, so their order in memory is ours to choose. Pack `w` once so that each lane finds its four
# words of a step side by side: then one load of 16 bytes for each lane, 512 contiguous bytes a warp, feeds one `mma`.

# %% [markdown] tr
# Komut sayısı 50 kattan fazla azaldı. Artık darboğaz yükleme; üstelik yüklenenin yarısı boşa gidiyor: warp, `A`'nın
# 0. sözcüğü için 8 satırın her birinden 16 bayt, yani yarım sektör okuyor.
#
# ## Alıştırma: ağırlığı şeritlerin istediği gibi saklamak
#
# Ağırlıklar değişmez; bellekteki sıraları bize kalmış. `w`'yi bir kez paketleyin ki her şerit, bir adımın dört
# sözcüğünü yan yana bulsun: o zaman her şeridin 16 baytlık tek yüklemesi, warp başına 512 bitişik bayt, bir `mma`'yı
# besler.

# %% [exercise] pack_fragments
def pack_fragments(w):
    """The words of a weight in the order of steps, lanes and words.

    w        float16 [16, K], K a multiple of 16
    returns  uint32 [K / 16, 32, 4]: word i of lane 4 g + t in step s is the pair at
             row    g + 8 * (i % 2)
             columns 16 s + 2 t + 8 * (i // 2) and the next, the first of them in the low half
    NumPy:   w.view(np.uint32) makes the pairs, [16, K / 2]; then reshape and transpose (roughly 3 lines)
    """
    raise NotImplementedError


# %% [solution] pack_fragments
def pack_fragments(w):
    pairs = np.ascontiguousarray(w).view(np.uint32)
    pairs = pairs.reshape(2, 8, w.shape[1] // 16, 2, 4)  # [i % 2, g, s, i // 2, t]
    return pairs.transpose(2, 1, 4, 3, 0).reshape(-1, 32, 4)


# %% [check] pack_fragments
check("pack_fragments", examine_pack_fragments, pack_fragments)


# %% [wrong] pack_fragments: lane 0, word 1 must hold row 8, columns 0 and 1; yours begins with row 0, column 8
def pack_fragments(w):  # the words of a lane in the wrong order
    pairs = np.ascontiguousarray(w).view(np.uint32).reshape(2, 8, w.shape[1] // 16, 2, 4)
    return pairs.transpose(2, 1, 4, 0, 3).reshape(-1, 32, 4)


# %% [wrong] pack_fragments: the first value of a pair belongs into the low half
def pack_fragments(w):  # swaps the halves
    pairs = w.reshape(2, 8, w.shape[1] // 16, 2, 4, 2).transpose(2, 1, 4, 3, 0, 5)
    return np.ascontiguousarray(pairs[..., ::-1]).view(np.uint32).reshape(-1, 32, 4)


# %% [wrong] pack_fragments: must hold row 8, columns 0 and 1
def pack_fragments(w):  # only reshapes: the natural order under another shape
    return np.ascontiguousarray(w).view(np.uint32).reshape(-1, 32, 4)


# %% [wrong] pack_fragments: yours is float16
def pack_fragments(w):  # forgets to make words of the pairs
    pairs = w.reshape(2, 8, w.shape[1] // 16, 2, 4, 2)
    return pairs.transpose(2, 1, 4, 3, 0, 5).reshape(-1, 32, 8)


# %% [markdown] en
# ## The same kernel on packed weights

# %% [markdown] tr
# ## Aynı çekirdek, paketlenmiş ağırlıklarla

# %%
def packed(x, w, out, row_words):
    lane = cuda.threadIdx.x
    g, t = lane // 4, lane % 4
    c0, c1, c2, c3 = float32(0), float32(0), float32(0), float32(0)
    k = t
    while k < row_words:
        a0, a1, a2, a3 = ldg128(w, (k // 8 * 32 + lane) * 4)
        b0, b1 = x[g * row_words + k], x[g * row_words + k + 4]
        c0, c1, c2, c3 = mma_m16n8k16_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
        k += 8
    out[2 * t * ROWS + g], out[(2 * t + 1) * ROWS + g] = c0, c1
    out[2 * t * ROWS + g + 8], out[(2 * t + 1) * ROWS + g + 8] = c2, c3


out = np.zeros((TOKENS, ROWS), np.float32)
packed_kernel = Kernel("packed_product", packed, (words, words, floats, int32), min_cc=(8, 0), block=32)
counters = run(packed_kernel, 1, [x.view(np.uint32), fragments(w), out, COLUMNS // 2])
np.testing.assert_allclose(out, expected, atol=1e-4)
print("loads:", counters.load.requests, " sectors:", counters.load.sectors)
assert (counters.load.requests, counters.load.sectors) == (24, 256)
weight_sectors = counters.load.sectors - 8 * 16  # x still comes in its natural order: 16 sectors a step
assert 32 * weight_sectors == w.nbytes  # the weight moves once, and nothing else with it

# %% [markdown] en
# Half the loads, and the weight's traffic is exactly its size. The tokens are still read in their natural order; the
# engine's kernel brings them through shared memory (`cp.async`, then `ldmatrix`), because many warps want them.
#
# ## The engine's product
#
# It is the same idea grown up: four warps share the columns, weights can be int8 or int4 and become float16 in
# registers, and the weight is the **left** factor as here, so that a single user's few tokens waste less of the
# instruction.

# %% [markdown] tr
# Yükleme sayısı yarıya indi, ağırlığın trafiği de tam kendi boyu kadar. Tokenlar hâlâ doğal sırada okunuyor; motorun
# çekirdeği onları paylaşımlı bellekten geçirir (`cp.async`, ardından `ldmatrix`), çünkü birçok warp aynı tokenları
# ister.
#
# ## Motorun çarpımı
#
# Aynı düşüncenin büyümüş hâli: sütunları dört warp paylaşır, ağırlıklar int8 ya da int4 olabilir ve yazmaçlarda
# float16'ya dönüşür. Ağırlık burada olduğu gibi **sol** çarpandır; böylece tek kullanıcının az sayıdaki tokenı
# komutun daha azını boşa harcar.

# %% [varies]
for name in ("product_float16", "product_int8"):  # the engine's own kernels, which go on improving
    subject = example(name)
    counters = run(subject.kernel, subject.grid, subject.fresh())
    products, efficiency = counters.by_kind["tensor core"], counters.load.efficiency
    print(f"{name}: {products} tensor-core instructions, efficiency {efficiency:.0%}")
    assert counters.load.efficiency > 0.9 and counters.bank_conflicts == 0

# %% [markdown] en
# ## What to read next
#
# - [`product.py`](../../cuda_kernels/product.py): its drawing shows how a block shares the columns and two turns of
#   copies.
# - [`packing.py`](../../cuda_kernels/packing.py) and [`weight_fragments.py`](../../cuda_kernels/weight_fragments.py):
#   your exercise for float16, int8 and int4, and how an integer becomes a float16 without a conversion.
# - [`intrinsics.py`](../../cuda_kernels/intrinsics.py): the comment over `mma_m16n8k16_f16` is the picture above in
#   words.
#
# Next: [16, embedding the engine in C](16_embedding_in_c.ipynb).

# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`product.py`](../../cuda_kernels/product.py): çizimi, bir bloğun sütunları nasıl paylaştığını ve iki tur önden
#   giden kopyaları gösterir.
# - [`packing.py`](../../cuda_kernels/packing.py) ve [`weight_fragments.py`](../../cuda_kernels/weight_fragments.py):
#   alıştırmanız, float16, int8 ve int4 için; ayrıca bir tam sayının dönüştürülmeden nasıl float16 olduğu.
# - [`intrinsics.py`](../../cuda_kernels/intrinsics.py): `mma_m16n8k16_f16`'nın üstündeki açıklama, yukarıdaki resmin
#   sözle anlatımıdır.
#
# Sonraki adım: [16, motoru C'ye gömmek](16_embedding_in_c.ipynb).
