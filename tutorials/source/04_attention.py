# %% [markdown] en
# # 04 · Attention, GQA and RoPE in NumPy
#
# **Goal.** Write the operation that reads the KV cache, as Llama models do it: causal **attention** with several
# query heads to one KV head (**GQA**, grouped-query attention) and positions that are told by rotation (**RoPE**,
# rotary position embedding). Check it against the engine's paged attention. About 15 minutes.
#
# A token asks with its **query** $q$. Every token before it, and it itself, answers with its **key** $k_j$; the
# softmax of the scores says how much of each **value** $v_j$ it takes:
#
# $$o = \sum_j p_j v_j \qquad p = \text{softmax}\left(\frac{q \cdot k_j}{\sqrt{D}}\right)$$
# %% [markdown] tr
# # 04 · NumPy ile dikkat, GQA ve RoPE
#
# **Amaç.** KV önbelleğini okuyan işlemi Llama modellerindeki biçimiyle yazmak: birkaç sorgu başının tek bir KV başını
# paylaştığı (**GQA**, grouped-query attention) nedensel **dikkat** (attention) ve konumu döndürerek bildiren **RoPE**
# (rotary position embedding). Sonucu motorun sayfalı dikkatiyle karşılaştıracaksınız. Yaklaşık 15 dakika.
#
# Token, **sorgusuyla** (query) $q$ sorar. Ondan önceki her token ve kendisi, **anahtarıyla** (key) $k_j$ yanıt verir.
# Skorların softmax'ı, her **değerden** (value) $v_j$ ne kadar alınacağını söyler:
#
# $$o = \sum_j p_j v_j \qquad p = \text{softmax}\left(\frac{q \cdot k_j}{\sqrt{D}}\right)$$

# %%
import numpy as np

from minipaged.model.architectures import load_weights
from minipaged.model.loader import load_model
from minipaged.model.rope import rope_tables
from minipaged.ops.reference import ReferenceOps
from tutorials.course import show
from tutorials.course.drawing import draw_shades

model, ops = load_model("tiny"), ReferenceOps()
config, weights = model.config, load_weights(model.config, model.source)
D, NUM_HEADS, NUM_KV_HEADS = config.head_dim, config.num_heads, config.num_kv_heads
print(NUM_HEADS, "query heads,", NUM_KV_HEADS, "KV heads, D =", D)
assert (NUM_HEADS, NUM_KV_HEADS, D) == (6, 2, 32)


def queries_keys_values(text, layer=0):
    """Of the model's first layer, rotated: q [T, 6, 32], k and v [T, 2, 32]."""
    ids = np.array(model.tokenizer.encode(text))
    x = ops.rms_norm(weights.embedding[ids], weights.layers[layer].input_norm.weight, config.norm_eps)
    qkv = ops.linear(x, weights.layers[layer].qkv.weight).reshape(len(ids), -1, D)
    q, k, v = qkv[:, :NUM_HEADS], qkv[:, NUM_HEADS : NUM_HEADS + NUM_KV_HEADS], qkv[:, NUM_HEADS + NUM_KV_HEADS :]
    cos, sin = rope_tables(config.layers[layer].rope, len(ids))
    ops.rope(q, cos, sin)
    ops.rope(k, cos, sin)
    return [model.tokenizer.decode([i]) for i in ids.tolist()], q, k, v


words, q, k, v = queries_keys_values("O Romeo, Romeo! wherefore art thou Romeo?")
scores = q[:, 5] @ k[:, 1].T / np.sqrt(D)  # one head: a row a query, a column a key
scores[np.triu_indices(len(words), 1)] = -np.inf  # nobody sees the future
p = np.exp(scores - scores.max(axis=1, keepdims=True))
p /= p.sum(axis=1, keepdims=True)
show(draw_shades("What each token looks at", p, words, words, note="layer 0, head 5; the area is the probability"))
assert np.allclose(p.sum(axis=1), 1) and np.allclose(p[0], np.eye(len(words))[0])

# %% [markdown] en
# Each row is a token and sums to one; the upper triangle is empty, because nobody sees the future. The first token
# can look only at itself.
#
# ## The naive version
#
# `tiny` has 6 query heads and only 2 KV heads: query heads 0, 1, 2 share KV head 0, and heads 3, 4, 5 share KV head
# 1. The simplest code repeats each KV head three times and then forgets about it:
# %% [markdown] tr
# Her satır bir tokendır ve toplamı birdir. Üst üçgen boştur, çünkü kimse geleceği görmez. İlk token yalnızca
# kendisine bakabilir.
#
# ## İlk akla gelen çözüm
#
# `tiny` modelinin 6 sorgu başı (query head) ama yalnızca 2 KV başı var: 0, 1, 2 numaralı sorgu başları 0 numaralı KV
# başını; 3, 4, 5 numaralılar ise 1 numaralıyı paylaşır. En basit kod, her KV başını üç kez yineler ve konuyu unutur:

# %%
def attend_repeated(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # copies
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    future = np.triu(np.ones(scores.shape[1:], bool), 1)
    scores[:, future] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", p, v)


stored = k.nbytes + v.nbytes
repeated = np.repeat(k, 3, axis=1).nbytes + np.repeat(v, 3, axis=1).nbytes
print("bytes of K and V:", stored, " after repeating:", repeated, " ratio", repeated / stored)
assert repeated == 3 * stored
assert np.allclose(attend_repeated(q, k, v)[:, 5], p @ v[:, 1], atol=1e-6)

# %% [markdown] en
# ## What hurts
#
# The repetition reads and writes 3 times what the cache holds, in every layer and every step. When a model generates
# one token at a time, reading K and V *is* the cost of attention. GQA was invented to make the cache small; repeating
# undoes it.
#
# ## The new version
#
# Give the query a group axis instead, `[T, NUM_KV_HEADS, group, D]`, and let the product broadcast over the group. K
# and V stay as they are. Query head `h` belongs to KV head `h // group`.
# %% [markdown] tr
# ## Sorun nerede?
#
# Yineleme, her katmanda ve her adımda, önbellekte duranın 3 katını okuyup yazar. Model tokenları tek tek üretirken
# dikkatin bedeli zaten K ile V'yi okumaktan *ibarettir*. GQA önbelleği küçültmek için bulundu; yinelemek bu kazancı
# geri verir.
#
# ## Yeni çözüm
#
# Bunun yerine sorguya bir grup ekseni ekleyin, `[T, NUM_KV_HEADS, group, D]`, ve çarpımın grup ekseni boyunca
# yayılmasını (broadcast) sağlayın. K ile V olduğu gibi kalır. `h` numaralı sorgu başı, `h // group` numaralı KV
# başını kullanır.

# %% [exercise] attend
def attend(q, k, v):
    """Causal grouped-query attention of one sequence (roughly 9 lines).

    Row i of `q` is the token at position i; it sees the positions 0 to i.

    Args:
        q: float32 array [T, num_heads, D].
        k, v: float32 arrays [T, num_kv_heads, D]; num_heads is a multiple of num_kv_heads.

    Returns:
        float32 array [T, num_heads, D]. Subtract the largest score of each row before `exp`, or it overflows.
    """
    raise NotImplementedError

# %% [solution] attend
def attend(q, k, v):
    T, num_heads, D = q.shape
    num_kv_heads = k.shape[1]
    q = q.reshape(T, num_kv_heads, num_heads // num_kv_heads, D)
    scores = np.einsum("qhgd,khd->hgqk", q, k) / np.sqrt(D)
    scores[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.einsum("hgqk,khd->qhgd", p, v).reshape(T, num_heads, D)

# %% [check] attend
from tutorials.course import check
from tutorials.course.step04 import examine_attend, examine_rotate

check("attend", examine_attend, attend)

# %% [wrong] attend: head 1 .* KV head 0
def attend(q, k, v):
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    k, v = np.tile(k, (1, num_heads // num_kv_heads, 1)), np.tile(v, (1, num_heads // num_kv_heads, 1))
    return attend_repeated(q, k, v)  # head h reads KV head h % num_kv_heads

# %% [wrong] attend: row 0 .* mean of the values 0 to 0
def attend(q, k, v):
    T, num_heads, D = q.shape
    q = q.reshape(T, k.shape[1], -1, D)
    scores = np.einsum("qhgd,khd->hgqk", q, k) / np.sqrt(D)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)  # everybody sees everything
    return np.einsum("hgqk,khd->qhgd", p, v).reshape(T, num_heads, D)

# %% [wrong] attend: differs from the engine's paged attention by \d.*sqrt
def attend(q, k, v):
    return attend_repeated(q * np.sqrt(q.shape[-1]), k, v)  # the scores are not divided

# %% [wrong] attend: NaN .* subtract
def attend(q, k, v):
    T, num_heads, D = q.shape
    q = q.reshape(T, k.shape[1], -1, D)
    scores = np.einsum("qhgd,khd->hgqk", q, k) / np.sqrt(D)
    scores[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
    with np.errstate(all="ignore"):
        p = np.exp(scores)  # overflows
        p /= p.sum(axis=-1, keepdims=True)
    return np.einsum("hgqk,khd->qhgd", p, v).reshape(T, num_heads, D)

# %% [markdown] en
# ## Where am I? RoPE
#
# The scores so far know nothing about order: shuffle the keys, and a query takes the same values. RoPE turns each
# query and key by an angle that grows with its position. A head of `D` values is taken as `D / 2` pairs, value `i`
# with value `i + D / 2`; pair `i` at position `m` turns by $m \cdot 10000^{-2i/D}$, just as a vector in the plane is
# turned:
#
# $$(a, b) \rightarrow (a \cos\varphi - b \sin\varphi,\; b \cos\varphi + a \sin\varphi)$$
#
# Turning both by the same angle leaves their product as it was. So a score depends on how far apart two tokens are,
# and not on where they stand:
# %% [markdown] tr
# ## Neredeyim? RoPE
#
# Skorlar şimdiye dek sırayı bilmiyor: Anahtarları karıştırın, sorgu yine aynı değerleri alır. RoPE her sorguyu ve
# anahtarı, konumuyla büyüyen bir açıyla döndürür. `D` değerli bir baş, `D / 2` çift olarak görülür: `i` numaralı
# değerin eşi `i + D / 2` numaralıdır. `m` konumundaki `i` numaralı çift, $m \cdot 10000^{-2i/D}$ kadar döner; tıpkı
# düzlemdeki bir vektör gibi:
#
# $$(a, b) \rightarrow (a \cos\varphi - b \sin\varphi,\; b \cos\varphi + a \sin\varphi)$$
#
# İkisini de aynı açıyla döndürmek çarpımlarını değiştirmez. Bu yüzden skor, iki tokenın nerede durduğuna değil,
# aralarındaki uzaklığa bağlıdır:

# %%
cos, sin = rope_tables(config.layers[0].rope, 512)
rng = np.random.default_rng(0)
query, key = rng.standard_normal((2, 1, 1, D), np.float32)


def score(query_position, key_position):
    a, b = query.copy(), key.copy()
    ops.rope(a, cos[[query_position]], sin[[query_position]])
    ops.rope(b, cos[[key_position]], sin[[key_position]])
    return float((a * b).sum())


print(f"distance 3: {score(7, 4):.3f} {score(307, 304):.3f}   distance 5: {score(9, 4):.3f}")
assert abs(score(7, 4) - score(307, 304)) < 1e-3 < abs(score(7, 4) - score(9, 4))

# %% [exercise] rotate
def rotate(x, positions):
    """Rotary position embedding with base 10000 (roughly 6 lines).

    Args:
        x: float32 array [T, heads, D], D even; not to be changed.
        positions: int array [T].

    Returns:
        float32 array [T, heads, D]: pair (i, i + D/2) of token t is turned by positions[t] * 10000 ** (-2 * i / D).
    """
    raise NotImplementedError

# %% [solution] rotate
def rotate(x, positions):
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-np.arange(half) / half)  # [T, 1, half]
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(np.float32)

# %% [check] rotate
check("rotate", examine_rotate, rotate)

# %% [wrong] rotate: value 0 .* pairs with value 16
def rotate(x, positions):
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., ::2], x[..., 1::2]  # neighbours are paired: another layout
    return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)

# %% [wrong] rotate: wrong way
def rotate(x, positions):
    half = x.shape[-1] // 2
    angles = -positions[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

# %% [wrong] rotate: pair 1 .* 0\.562
def rotate(x, positions):
    half = x.shape[-1] // 2
    angles = np.broadcast_to(positions[:, None, None], (len(x), 1, half))  # all pairs turn equally fast
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

# %% [markdown] en
# ## What to read next
#
# - [`interface.py`](../../minipaged/ops/interface.py): the operators of a backend, with all shapes stated once.
# - [`attention.py`](../../minipaged/ops/reference/attention.py): paged attention in NumPy for a whole batch; decode
#   and prefill go different ways.
# - [`rope.py`](../../minipaged/model/rope.py): the stretched rotations with which models read further than they were
#   trained.
# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`interface.py`](../../minipaged/ops/interface.py): bir arka ucun işlemleri; bütün boyutlar bir kez, burada
#   yazılıdır.
# - [`attention.py`](../../minipaged/ops/reference/attention.py): bütün bir yığın için NumPy ile sayfalı dikkat; çözme
#   (decode) ile ön doldurma (prefill) ayrı yollardan gider.
# - [`rope.py`](../../minipaged/model/rope.py): modellerin, eğitildiklerinden daha uzun metinleri okumasını sağlayan
#   gerilmiş dönüşler.
