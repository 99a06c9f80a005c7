# %% [markdown] en
# # 12 · Making it fast on a CPU
#
# **Goal.** Know how fast a decode step could be on your machine before optimising it, then get closer by two means:
# fewer bytes (int8) and no Python inside a step (one compiled step). About 15 minutes. You need step 05 (the forward
# pass). The first run compiles kernels, which may take half a minute; later ones find them in a cache.

# %% [markdown] tr
# # 12 · CPU'da hızlandırma
#
# **Amaç.** Bir çözme adımının makinenizde ne kadar hızlı olabileceğini, onu hızlandırmaya başlamadan önce bilmek;
# sonra iki yolla bu sınıra yaklaşmak: daha az bayt (int8) ve adımın içinde hiç Python olmaması (tek parça derlenmiş
# adım). Yaklaşık 15 dakika. Önkoşul: 05 (ileri geçiş). İlk çalıştırmada çekirdekler derlenir, bu yarım dakika
# sürebilir; sonrakiler önbellekten gelir.

# %%
import time

import numpy as np

from minipaged import Engine, EngineConfig, SamplingParams
from minipaged.backends import examine, set_num_threads
from minipaged.bench.bandwidth import read_bandwidth
from tutorials.course import check, show

# %% [markdown] en
# ## The roofline: two floors under every step
#
# A decode step reads **every weight once** and does about **two operations a weight and token** (one multiplication,
# one addition). So it can never take less time than the larger of
#
# ```
# t_read    = weight_bytes / bandwidth
# t_compute = 2 * num_weights * num_tokens / peak
# ```
#
# Plotted over the number of tokens, the two floors form a roof, which gave the model its name: the **roofline**. Let
# us measure both rates here and now, with one thread.

# %% [markdown] tr
# ## Çatı çizgisi: her adımın altında iki taban
#
# Bir çözme (decode) adımı **her ağırlığı bir kez okur** ve **ağırlık ve token başına yaklaşık iki işlem** yapar (bir
# çarpma, bir toplama). Dolayısıyla adımın süresi şu ikisinden büyük olanın altına asla inemez:
#
# ```
# t_read    = weight_bytes / bandwidth
# t_compute = 2 * num_weights * num_tokens / peak
# ```
#
# Token sayısına göre çizildiğinde bu iki sınır bir çatı oluşturur; modelin adı da buradan gelir: **çatı çizgisi**
# (roofline). İki hızı da burada, tek iş parçacığıyla ölçelim.

# %% [varies]
bandwidth = read_bandwidth(1, array_bytes=128 << 20, passes=3)


set_num_threads(1)


def peak_rate(size=512):
    """float32 operations a second of NumPy's own matrix product: not the peak, but what this machine really gives."""
    a, best = np.ones((size, size), np.float32), 9e9
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


peak = peak_rate()
print(f"reads {bandwidth / 1e9:.0f} GB/s, computes {peak / 1e9:.0f} billion operations/s")
assert bandwidth > 1e8 and peak > 1e8

# %% [markdown] en
# ## Naive: NumPy, float32, one operator after another
#
# That is the `reference` backend: every operator is a line of NumPy that you can read. It is the law for all others,
# and it is slow: Python between operators, and four bytes a weight.

# %% [markdown] tr
# ## İlk akla gelen çözüm: NumPy, float32, birbiri ardına işleçler
#
# `reference` arka ucu (backend) budur: her işleç, okuyabileceğiniz bir NumPy satırıdır. Ötekilerin hepsi için yasa
# odur, ama yavaştır: işleçlerin arasında Python, ağırlık başına dört bayt.

# %% [varies]
def step_seconds(**options):
    """Seconds of one decode step for one user: the best of three generations of 48 tokens; and bytes of the weights."""
    engine = Engine(EngineConfig("tiny", num_threads=1, num_blocks=16, enable_prefix_caching=False, **options))
    best = 9e9
    for _ in range(3):
        engine.add_request([11, 12, 13], SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
        before = engine.stats().step_seconds
        while engine.has_unfinished():
            engine.step()
        best = min(best, (engine.stats().step_seconds - before) / 48)
    weight_bytes = engine.stats().weight_bytes
    engine.close()
    return best, weight_bytes


measured = {"NumPy float32": step_seconds(device="reference")}
seconds, weight_bytes = measured["NumPy float32"]
num_weights = weight_bytes // 4
floor = weight_bytes / bandwidth
print(f"{1e6 * seconds:.0f} us a step; reading {weight_bytes / 1e6:.1f} MB takes {1e6 * floor:.0f} us")
assert num_weights == 1_771_200

# %% [markdown] en
# One user's step is bound by reading: for one token the arithmetic takes less time than the bytes, and from how many
# tokens on it takes more is a matter of one division:

# %% [markdown] tr
# Tek kullanıcının adımını okuma belirler: bir token için aritmetik, baytların okunmasından kısa sürer. Kaç tokendan
# sonra durumun tersine döndüğünü bulmak tek bir bölme işidir:

# %% [varies]
for num_tokens in (1, 4, 16, 64, 256):
    read, compute = weight_bytes / bandwidth, 2 * num_weights * num_tokens / peak
    print(f"{num_tokens:>4} tokens: read {1e6 * read:6.0f} us, compute {1e6 * compute:6.0f} us")
turning_point = weight_bytes / bandwidth / (2 * num_weights / peak)
print(f"beyond about {turning_point:.0f} tokens a step, arithmetic decides")
assert turning_point > 0

# %% [markdown] en
# That is why batching (step 07) and speculation (step 11) are nearly free for few tokens, and why a single user wants
# **fewer bytes**.
#
# ## Exercise: int8 weights, one scale a row
#
# Replace each row of a weight matrix by small integers and one scale: `w[i, j] ≈ scale[i] * q[i, j]`. Each row of `W`
# makes one output, so a row's scale can be multiplied in after the product of integers. This is called
# **quantisation**.

# %% [markdown] tr
# Yığınlamanın (adım 07) ve spekülasyonun (adım 11) az sayıda token için neredeyse bedava olması da, tek kullanıcının
# **daha az bayt** istemesi de bundandır.
#
# ## Alıştırma: satır başına tek ölçekle int8 ağırlıklar
#
# Ağırlık matrisinin her satırını küçük tam sayılarla ve tek bir ölçekle değiştirin: `w[i, j] ≈ scale[i] * q[i, j]`.
# `W`'nin her satırı tek bir çıktı üretir; bu yüzden satırın ölçeği, tam sayıların çarpımından sonra bir kerede
# çarpılabilir. Bu işleme **nicemleme** (quantisation) denir.

# %% [exercise] quantize_rows
def quantize_rows(w):
    """int8 weights with a scale a row.

    w        float32 [N, K]
    returns  (q int8 [N, K], scale float32 [N])
             scale[i] = max |w[i]| / 127, and 1 for a row of zeros
             q = w / scale, rounded to the nearest integer, so -127 to 127
    (roughly 5 lines)
    """
    raise NotImplementedError


# %% [solution] quantize_rows
def quantize_rows(w):
    scale = np.abs(w).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    q = np.rint(w / scale[:, None]).astype(np.int8)
    return q, scale


# %% [check] quantize_rows
def check_quantize_rows(quantize_rows):
    rng = np.random.default_rng(12)
    w = rng.standard_normal((6, 64)).astype(np.float32) * np.array([[1], [100], [0.01], [3], [1], [7]], np.float32)
    q, scale = quantize_rows(w.copy())
    assert q.dtype == np.int8, f"q must be int8, one byte a weight; it is {q.dtype}"
    assert scale.shape == (6,), f"one scale for each of the 6 rows, shape (6,); yours has the shape {scale.shape}"
    back = scale[:, None] * q.astype(np.float32)
    wrong_sign = np.sign(back) * np.sign(w) < 0
    assert not wrong_sign.any(), "a large weight changed its sign: 128 does not fit into int8, the largest becomes 127"
    error = np.abs(back - w).max(axis=1) / (np.abs(w).max(axis=1) / 127)
    assert error.max() < 0.502, (
        f"rounding to the nearest may miss by half a scale; row {error.argmax()} misses by {error.max():.2f} scales"
    )
    w[2] = 0
    q, scale = quantize_rows(w.copy())
    assert np.isfinite(scale).all() and not q[2].any() and scale[2] == 1, (
        f"a row of zeros must stay zeros, with scale 1; its scale became {scale[2]}"
    )


check("quantize_rows", check_quantize_rows, quantize_rows)


# %% [wrong] quantize_rows: one scale for each of the 6 rows
def quantize_rows(w):  # one scale for the whole matrix
    scale = np.abs(w).max(keepdims=True).reshape(1) / np.float32(127)
    return np.rint(w / scale[:, None]).astype(np.int8), scale


# %% [wrong] quantize_rows: may miss by half a scale
def quantize_rows(w):  # cuts off instead of rounding
    scale = np.abs(w).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    return (w / scale[:, None]).astype(np.int8), scale


# %% [wrong] quantize_rows: 128 does not fit into int8
def quantize_rows(w):  # divides by 128
    scale = np.abs(w).max(axis=1) / np.float32(128)
    scale[scale == 0] = 1
    return np.rint(w / scale[:, None]).astype(np.int32).astype(np.int8), scale


# %% [wrong] quantize_rows: a row of zeros must stay zeros
def quantize_rows(w):  # divides by zero
    scale = np.abs(w).max(axis=1) / np.float32(127)
    with np.errstate(all="ignore"):
        return np.nan_to_num(np.rint(w / scale[:, None])).astype(np.int8), scale


# %% [markdown] en
# ## New: one compiled step
#
# The `cpu` backend packs the weights once into the order in which it will read them, and compiles the **whole step**
# (all layers, all operators, all threads) to one function that Python calls once. Here is the same step, first with
# float32, then with int8 weights.

# %% [markdown] tr
# ## Yeni çözüm: tek parça derlenmiş adım
#
# `cpu` arka ucu ağırlıkları bir kez, okunacakları sırada paketler ve **adımın tamamını** (bütün katmanlar, bütün
# işleçler, bütün iş parçacıkları) Python'ın bir kez çağırdığı tek bir fonksiyona derler. Aynı adım, önce float32,
# sonra int8 ağırlıklarla:

# %% [varies]
backend = examine("cpu")
if backend.available:
    measured["compiled float32"] = step_seconds(device="cpu", dtype="float32")
    measured["compiled int8"] = step_seconds(device="cpu", quantization="int8")
    assert 3.5 < measured["NumPy float32"][1] / measured["compiled int8"][1] < 4
else:
    print("the cpu backend cannot run here:", backend.reason)


def bars(measured, bandwidth):
    """A drawing: for each version the time of a step (bar) and the time to read its weights (line)."""
    longest = max(seconds for seconds, _ in measured.values())
    parts = []
    for row, (name, (seconds, weight_bytes)) in enumerate(measured.items()):
        y, width, floor = 34 * row, 420 * seconds / longest, 420 * weight_bytes / bandwidth / longest
        label = f"{name}: {1e6 * seconds:.0f} us, {weight_bytes / 1e6:.1f} MB"
        parts.append(f'<text x="4" y="{y + 12}" font-size="12" font-family="sans-serif" fill="#555">{label}</text>')
        parts.append(f'<rect x="4" y="{y + 16}" width="{width:.1f}" height="12" fill="#4e79a7"/>')
        parts.append(f'<rect x="{4 + floor:.1f}" y="{y + 14}" width="3" height="16" fill="#e15759"/>')
    height = 34 * len(measured) + 4
    size = f'width="440" height="{height}" viewBox="0 0 440 {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


show(bars(measured, bandwidth), "; ".join(f"{name} {1e6 * s:.0f} us" for name, (s, _) in measured.items()))

# %% [markdown] en
# Bars are measured, red lines are floors: what reading the weights from memory takes at least. int8 moved the floor
# (about 3.8 times fewer bytes) and the compiled step came closer to it. `tiny` is so small that much of it stays in
# the CPU's caches, where reading is faster, so a bar may even end left of its line; with SmolLM2 the line holds.
# `minipaged bench roofline` and README's section "Measured" do this properly, with the loss of quality beside the
# gain.
#
# ## What to read next
#
# - [`step.py`](../../minipaged/ops/cpu/step.py): the compiled step; [`team.py`](../../minipaged/ops/cpu/team.py): its
#   threads and their barrier.
# - [`packing.py`](../../minipaged/ops/cpu/packing.py) and
#   [`products_int8.py`](../../minipaged/ops/cpu/products_int8.py): your exercise, laid out for the instruction that
#   reads it.
# - [`roofline.py`](../../minipaged/bench/roofline.py): both floors, measured without a library in between.
#
# Next: [13, your first CUDA kernel](13_first_cuda_kernel.ipynb), on a machine without a GPU.

# %% [markdown] tr
# Çubuklar ölçülen süreler, kırmızı çizgiler tabanlar: ağırlıkları bellekten okumanın en az ne kadar süreceği. int8
# tabanı aşağı çekti (yaklaşık 3,8 kat daha az bayt), derlenmiş adım da ona yaklaştı. `tiny` o kadar küçük ki büyük
# bölümü işlemcinin önbelleklerinde kalır; oradan okumak daha hızlı olduğundan bir çubuk çizgisinin soluna bile
# düşebilir. SmolLM2'de çizgi geçerlidir. `minipaged bench roofline` ile README'nin "Measured" bölümü bunu gereğince,
# kazancın yanında kalite kaybıyla birlikte ölçer.
#
# ## Sırada ne okumalı?
#
# - [`step.py`](../../minipaged/ops/cpu/step.py): derlenmiş adım; [`team.py`](../../minipaged/ops/cpu/team.py): iş
#   parçacıkları ve bariyerleri.
# - [`packing.py`](../../minipaged/ops/cpu/packing.py) ve
#   [`products_int8.py`](../../minipaged/ops/cpu/products_int8.py): alıştırmanız, onu okuyacak komuta göre dizilmiş
#   hâlde.
# - [`roofline.py`](../../minipaged/bench/roofline.py): iki taban, arada kitaplık olmadan ölçülmüş.
#
# Sonraki adım: [13, ilk CUDA çekirdeğiniz](13_first_cuda_kernel.ipynb), GPU'suz bir makinede.
