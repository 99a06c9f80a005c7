# %% [markdown] en
# # 10 · Prefix caching and its security
#
# **Goal.** Never compute the same beginning of a prompt twice, and do so without ever giving a request foreign KV and
# without telling one user what another has asked. About 15 minutes. You need step 09 (reference counts).

# %% [markdown] tr
# # 10 · Önek önbelleği ve güvenliği
#
# **Amaç.** Bir istemin aynı başlangıcını asla iki kez hesaplamamak; bunu yaparken hiçbir isteğe başkasının KV'sini
# vermemek ve bir kullanıcıya ötekinin ne sorduğunu sezdirmemek. Yaklaşık 15 dakika. Önkoşul: 09 (referans sayıları).

# %%
import time

import numpy as np

from minipaged import Engine, EngineConfig, SamplingParams
from minipaged.core import prefix_cache
from minipaged.core.prefix_cache import hash_block, root_hash
from minipaged.view import draw_blocks
from tutorials.course import check, show

BLOCK_SIZE = 16


def make_engine(**options):
    limits = dict(num_threads=1, num_blocks=96, block_size=BLOCK_SIZE)
    return Engine(EngineConfig("tiny", device="reference", **limits, **options))


def run(engine, token_ids, max_tokens=4, **options):
    """The output of one greedy request."""
    engine.add_request(token_ids, SamplingParams(temperature=0, max_tokens=max_tokens), **options)
    while engine.has_unfinished():
        outputs = engine.step()
    return outputs[0]


# %% [markdown] en
# ## Naive: compute every prompt from its first token
#
# Eight users ask a question of 10 tokens each, all behind one system prompt of 96 tokens. Without a cache the engine
# computes 106 tokens eight times.

# %% [markdown] tr
# ## İlk akla gelen çözüm: her istemi ilk tokenından hesaplamak
#
# Sekiz kullanıcı, 96 tokenlık aynı sistem isteminin ardından 10'ar tokenlık birer soru soruyor. Önbelleksiz motor
# sekiz kez 106 token hesaplar.

# %%
rng = np.random.default_rng(10)
system_prompt = rng.integers(10, 1000, 96).tolist()
questions = [rng.integers(10, 1000, 10).tolist() for _ in range(8)]


def tokens_computed(**options):
    engine = make_engine(**options)
    outputs = [run(engine, system_prompt + question) for question in questions]
    return engine.stats(), [output.outputs[0].token_ids for output in outputs], engine


stats, without, _ = tokens_computed(enable_prefix_caching=False)
print("prompt tokens computed:", stats.num_prompt_tokens_computed)
assert stats.num_prompt_tokens_computed == 8 * 106 == 848

# %% [markdown] en
# ## New: name each full block by everything up to its end
#
# A block of KV can be used again when **all tokens up to its end** are equal, since KV depends on everything before
# it. So each full block gets a hash of its own tokens *and of the hash of the block before it*: a chain.
#
# ```
# root ──▶ h0 = sha256(root, tokens[0:16]) ──▶ h1 = sha256(h0, tokens[16:32]) ──▶ …
# ```
#
# These are the engine's functions. The same 16 tokens after different beginnings have different names:

# %% [markdown] tr
# ## Yeni çözüm: her dolu bloğu, sonuna kadarki her şeyle adlandırmak
#
# KV kendisinden önceki her şeye bağlıdır; bu yüzden bir KV bloğu ancak **bloğun sonuna kadarki bütün tokenlar**
# aynıysa yeniden kullanılabilir. Her dolu blok için, kendi tokenlarının *ve bir önceki bloğun özetinin* özeti (hash)
# alınır; ortaya bir zincir çıkar.
#
# ```
# root ──▶ h0 = sha256(root, tokens[0:16]) ──▶ h1 = sha256(h0, tokens[16:32]) ──▶ …
# ```
#
# Bunlar motorun kendi fonksiyonları. Aynı 16 token, farklı başlangıçlardan sonra farklı adlar alır:

# %%
block = tuple(range(100, 116))
after_a = hash_block(hash_block(root_hash(None), (1,) * 16), block)
after_b = hash_block(hash_block(root_hash(None), (2,) * 16), block)
print(after_a.hex()[:16], after_b.hex()[:16])
assert after_a != after_b and len(after_a) == 32

stats, with_cache, engine = tokens_computed()
print("prompt tokens computed:", stats.num_prompt_tokens_computed, " from the cache:", stats.num_prompt_tokens_cached)
assert stats.num_prompt_tokens_computed == 106 + 7 * 10 == 176
assert stats.num_prompt_tokens_cached == 7 * 96 == 672
assert with_cache == without  # the same tokens: a cache changes the time, never the answer
show(draw_blocks(engine), "all blocks are free, and the cached ones can still be found")

# %% [markdown] en
# 176 tokens instead of 848, and the same answers. In the picture nobody runs: every block is free, yet the published
# ones can still be found. A hit takes such a block out of the middle of the free queue; if memory runs short first,
# the least recently used of them gives way (**eviction**).
#
# ## Exercise: the longest hit
#
# Three rules: follow the **chain**; stop at the **first** block that is missing; and **leave the last token** to be
# computed, because its logits are what the request came for.

# %% [markdown] tr
# 848 yerine 176 token ve aynı yanıtlar. Resimde çalışan kimse yok: bütün bloklar boş, ama yayımlanmış (published)
# olanlar hâlâ bulunabiliyor. İsabet (hit) olduğunda böyle bir blok boş blok kuyruğunun ortasından alınır; bellek daha
# önce tükenirse en uzun süredir kullanılmayan blok yerini bırakır; buna **tahliye** (eviction) denir.
#
# ## Alıştırma: en uzun isabet
#
# Üç kural: **zinciri** izleyin; eksik olan **ilk** blokta durun; **son tokenı** hesaplanmak üzere bırakın, çünkü
# istek zaten onun logitleri için gelmiştir.

# %% [exercise] longest_hit
def longest_hit(token_ids, cached, block_size):
    """Block ids that may be shared by a request, first block first.

    token_ids    list of int        the request's tokens
    cached       dict bytes -> int  block id by chained hash: hash_block(parent_hash, tuple of tokens)
                                    the parent of the first block is root_hash(None)
    returns      list of block ids; together they hold at most len(token_ids) - 1 tokens
    (roughly 9 lines)
    """
    raise NotImplementedError


# %% [solution] longest_hit
def longest_hit(token_ids, cached, block_size):
    hits = []
    parent = root_hash(None)
    for index in range((len(token_ids) - 1) // block_size):
        parent = hash_block(parent, tuple(token_ids[index * block_size : (index + 1) * block_size]))
        if parent not in cached:
            break
        hits.append(cached[parent])
    return hits


# %% [check] longest_hit
def check_longest_hit(longest_hit):
    tokens = [5, 6, 7, 8, 5, 6, 7, 8, 9, 9, 9, 9]
    names = [root_hash(None)]
    for i in range(0, 12, 4):
        names.append(hash_block(names[-1], tuple(tokens[i : i + 4])))
    cached = {names[1]: 30, names[2]: 11, names[3]: 20}
    found = longest_hit(tokens + [1], cached, 4)
    assert found == [30, 11, 20], f"all three blocks are cached under the chain of hashes: [30, 11, 20], not {found}"
    found = longest_hit(tokens, cached, 4)
    assert found == [30, 11], (
        f"12 tokens, all cached: the last token must still be computed, so [30, 11]; you returned {found}"
    )
    found = longest_hit(tokens + [1], {names[1]: 30, names[3]: 20}, 4)
    assert found == [30], f"the second block is missing, so nothing behind it may be used: [30], not {found}"
    found = longest_hit([9, 9, 9, 9] + tokens[4:] + [1], cached, 4)
    assert found == [], f"the request begins differently, so none of its blocks is known; you returned {found}"
    assert longest_hit([5, 6], cached, 4) == [], "two tokens fill no block of four, so there is no hit"


check("longest_hit", check_longest_hit, longest_hit)


# %% [wrong] longest_hit: under the chain of hashes
def longest_hit(token_ids, cached, block_size):  # each block by its own tokens
    hits = []
    for index in range((len(token_ids) - 1) // block_size):
        name = hash_block(root_hash(None), tuple(token_ids[index * block_size : (index + 1) * block_size]))
        if name not in cached:
            break
        hits.append(cached[name])
    return hits


# %% [wrong] longest_hit: the last token must still be computed
def longest_hit(token_ids, cached, block_size):  # takes the whole prompt from the cache
    hits = []
    parent = root_hash(None)
    for index in range(len(token_ids) // block_size):
        parent = hash_block(parent, tuple(token_ids[index * block_size : (index + 1) * block_size]))
        if parent not in cached:
            break
        hits.append(cached[parent])
    return hits


# %% [wrong] longest_hit: nothing behind it may be used
def longest_hit(token_ids, cached, block_size):  # goes on behind a missing block
    hits = []
    parent = root_hash(None)
    for index in range((len(token_ids) - 1) // block_size):
        parent = hash_block(parent, tuple(token_ids[index * block_size : (index + 1) * block_size]))
        if parent in cached:
            hits.append(cached[parent])
    return hits


# %% [markdown] en
# ## Security 1: a hash is a proposal, never a proof
#
# sha256 does not collide by chance. But should a key ever be equal for two prefixes, by a bug or a shorter hash, a
# request would get somebody else's KV: wrong, and a leak. So the engine keeps the tokens of each published block and
# **compares them token by token**, and it checks that the block continues the very content matched before it. Let us
# break the hash on purpose: one byte, nearly always the same.

# %% [markdown] tr
# ## Güvenlik 1: özet bir öneridir, kanıt değil
#
# sha256 rastlantıyla çakışmaz. Ama bir hata ya da daha kısa bir özet yüzünden iki farklı önek aynı anahtara düşerse
# bir istek başkasının KV'sini alır: bu hem yanlış hem de sızıntıdır. Bu yüzden motor yayımlanan her bloğun
# tokenlarını saklar, **token token karşılaştırır** ve bloğun, kendisinden önce eşleşen içeriğin devamı olup
# olmadığını denetler. Özeti bilerek bozalım: tek bayt, hemen hep aynı.

# %%
weak = make_engine()
real_hash = prefix_cache.hash_block
prefix_cache.hash_block = lambda parent_hash, token_ids: bytes([len(parent_hash) % 2])
try:
    strangers = [rng.integers(10, 1000, 40).tolist() for _ in range(4)]
    guarded = [run(weak, prompt) for prompt in strangers]
finally:
    prefix_cache.hash_block = real_hash
honest = [run(make_engine(enable_prefix_caching=False), prompt) for prompt in strangers]
print("cached tokens in spite of equal hashes:", [output.num_cached_tokens for output in guarded])
assert [output.num_cached_tokens for output in guarded] == [0, 0, 0, 0]
assert [output.outputs[0].token_ids for output in guarded] == [output.outputs[0].token_ids for output in honest]

# %% [markdown] en
# Every lookup found *some* block under the colliding key, and every one was refused.
#
# ## Security 2: time tells
#
# A hit is fast, and speed can be seen from outside. Here an attacker wants to know which of three documents somebody
# else has just sent. The attacker sends each of them once and looks at a clock.

# %% [markdown] tr
# Her arama çakışan anahtarın altında *bir* blok buldu, hepsi de geri çevrildi.
#
# ## Güvenlik 2: süre ele verir
#
# İsabet hızlıdır, hız da dışarıdan görülür. Buradaki saldırgan, üç belgeden hangisinin az önce başkası tarafından
# gönderildiğini öğrenmek istiyor. Her birini birer kez gönderip saate bakıyor.

# %% [varies]
documents = [rng.integers(10, 1000, 320).tolist() for _ in range(3)]
VICTIM = 1


def attack(salt=None):
    """Seconds and cached tokens of each document, as the attacker sees them; the best of two rounds."""
    seconds, cached = [9e9] * 3, [0] * 3
    for _ in range(2):
        engine = make_engine()
        run(engine, rng.integers(10, 1000, 32).tolist())  # warm up with something else
        run(engine, documents[VICTIM], max_tokens=1, cache_salt=salt)
        for number, document in enumerate(documents):
            started = time.perf_counter()
            cached[number] = run(engine, document, max_tokens=1).num_cached_tokens
            seconds[number] = min(seconds[number], time.perf_counter() - started)
    return seconds, cached


seconds, cached = attack()
print("milliseconds:", [round(1e3 * each) for each in seconds], " cached tokens:", cached)
assert int(np.argmin(seconds)) == VICTIM  # the clock gave the victim away
assert cached == [0, 304, 0]

# %% [markdown] en
# The fast answer is the victim's document. (304 tokens: of 20 full blocks the last is left, with the last token.)
# This **timing side channel** is not a bug of one engine; it is what a shared cache is.
#
# The remedy is to share only among those who trust each other. `cache_salt` goes into the root of the chain: requests
# with different salts have no hash in common, and the tokens of equal prompts are never even compared. A service
# gives each tenant a secret salt.

# %% [markdown] tr
# Hızlı gelen yanıt, kurbanın belgesine ait. (304 token: 20 dolu bloğun sonuncusu, son tokenla birlikte hesaplamaya
# kalır.) Bu **zamanlama yan kanalı** (timing side channel) tek bir motorun hatası değildir; paylaşılan önbelleğin
# doğası budur.
#
# Çaresi, yalnızca birbirine güvenenlerin paylaşmasıdır. `cache_salt` (önbellek tuzu) zincirin köküne girer: tuzları
# farklı olan isteklerin ortak tek bir özeti bile olmaz, istemler aynı olsa da tokenları karşılaştırılmaz. Bir hizmet,
# her müşterisine gizli bir tuz verir.

# %% [varies]
seconds, cached = attack(salt="tenant-A's secret")
print("milliseconds:", [round(1e3 * each) for each in seconds], " cached tokens:", cached)
assert cached == [0, 0, 0]  # nothing to be seen
assert root_hash("tenant-A's secret") != root_hash("tenant-B's secret") != root_hash(None)

# %% [markdown] en
# Nothing was cached for the attacker, so there is nothing to measure. The price: tenants do not profit from each
# other's work any more, only from their own.
#
# ## What to read next
#
# - [`prefix_cache.py`](../../minipaged/core/prefix_cache.py): `match`, and `_find` with the two comparisons.
# - [`block_pool.py`](../../minipaged/core/block_pool.py): the drawing of the free queue, and `publish`.
# - [`test_prefix_cache.py`](../../tests/core/test_prefix_cache.py): colliding hashes, as a test.
#
# Next: [11, speculative decoding](11_speculative_decoding.ipynb).

# %% [markdown] tr
# Saldırgan için önbellekte hiçbir şey yok, demek ki ölçecek bir şey de yok. Bedeli: müşteriler artık birbirlerinin
# değil, yalnızca kendi işlerinin önbelleğinden yararlanır.
#
# ## Sırada ne okumalı?
#
# - [`prefix_cache.py`](../../minipaged/core/prefix_cache.py): `match` ile iki karşılaştırmayı yapan `_find`.
# - [`block_pool.py`](../../minipaged/core/block_pool.py): boş blok kuyruğunun çizimi ve `publish`.
# - [`test_prefix_cache.py`](../../tests/core/test_prefix_cache.py): çakışan özetler, test olarak.
#
# Sonraki adım: [11, spekülatif çözme](11_speculative_decoding.ipynb).
