# %% [markdown] en
# # 06 · Sampling
#
# **Goal.** Turn logits into a token: greedy, temperature, top-k and top-p. And do it so that the tokens of a request
# depend on nothing but the request: not on who else is in the batch, not on how often it was interrupted. About 12
# minutes.
#
# The forward pass of step 05 gives a score to each of 1024 tokens. The softmax turns scores into probabilities. A
# **temperature** divides the scores first: below 1 the likely become likelier, above 1 the differences shrink. The
# limit 0 is **greedy**: always the likeliest.
# %% [markdown] tr
# # 06 · Örnekleme
#
# **Amaç.** Logitlerden bir token çıkarmak: açgözlü seçim, sıcaklık, top-k ve top-p. Üstelik bunu, bir isteğin
# tokenları yalnızca isteğin kendisine bağlı olacak biçimde yapmak: Yığında başka kimlerin olduğu ya da isteğin kaç
# kez kesildiği fark etmemeli. Yaklaşık 12 dakika.
#
# 05. adımdaki ileri geçiş, 1024 tokenın her birine bir skor verir; softmax da skorları olasılıklara çevirir.
# **Sıcaklık** (temperature) önce skorları böler: 1'in altında olası olanlar daha da olası hâle gelir, 1'in üstünde
# farklar küçülür. 0 sınırı **açgözlü** (greedy) seçimdir: hep en olası token.

# %%
import numpy as np

from minipaged.model.architectures import load_weights
from minipaged.model.loader import load_model
from tutorials.course import show
from tutorials.course.drawing import draw_bars
from tutorials.course.step05 import engine_forward, word

model = load_model("tiny")
weights = load_weights(model.config, model.source)
logits = engine_forward(model.config, weights, model.tokenizer.encode("ROMEO:\nI"))


def softmax(scores):
    p = np.exp(scores - scores.max())
    return p / p.sum()


best = np.argsort(-logits)[:12]
bars = {f"temperature {t}": softmax(logits / t)[best].tolist() for t in (0.5, 1.0, 1.5)}
note = f"probabilities; the highest bar is {max(bars['temperature 0.5']):.2f}"
show(draw_bars("What follows 'ROMEO: I'", bars, [word(model, i) for i in best.tolist()], note=note))
kept = int((np.cumsum(np.sort(softmax(logits))[::-1]) < 0.9).sum()) + 1
print("tokens that hold 90% of the probability:", kept, "of", len(logits))
assert (len(logits), kept, len(logits) - kept) == (1024, 52, 972)

# %% [markdown] en
# 52 tokens hold 90% of the probability. The other 972 are the tail: each is unlikely, together they are drawn once in
# ten times, and one nonsense token spoils what follows. So the tail is cut: **top-k** keeps the k likeliest;
# **top-p** keeps the smallest set of likeliest tokens whose probability reaches p.
#
# ## The naive version
#
# One random generator for the engine, and every request that needs a token draws from it:
# %% [markdown] tr
# Olasılığın %90'ı 52 tokenda toplanıyor. Kalan 972 token kuyruktur: Tek tek hiçbiri olası değildir, ama hepsi
# birlikte on kezde bir çekilir ve tek bir saçma token, devamını da bozar. Bu yüzden kuyruk kesilir: **top-k** en olası
# k tokenı tutar; **top-p** ise olasılığı p'ye ulaşan en küçük olası tokenlar kümesini.
#
# ## İlk akla gelen çözüm
#
# Motorun tek bir rastgele sayı üreteci olsun, token gereken her istek ondan çeksin:

# %%
def draws_of_first(num_requests, num_steps=40):
    generator = np.random.default_rng(7)
    p = softmax(logits)
    tokens = []
    for _ in range(num_steps):
        drawn = [int(generator.choice(len(p), p=p)) for _ in range(num_requests)]  # each request one
        tokens.append(drawn[0])
    return tokens


alone, in_company = draws_of_first(1), draws_of_first(2)
same = sum(a == b for a, b in zip(alone, in_company, strict=True))
print("the same request, alone and beside another:", same, "of 40 tokens agree")
assert same == 3

# %% [markdown] en
# ## What hurts
#
# The same request with the same seed: only 3 of 40 tokens agree, because somebody else drew in between. Nobody can
# reproduce an answer, no test can compare two runs, and a request that is interrupted and computed again would
# continue differently.
#
# ## The new version
#
# A **counter-based** generator has no state. It is a function: the random number of a token is `uniform(seed,
# position)`, with the seed of the request and the position in its own sequence. And one number is enough for a draw:
# lay the probabilities side by side on the line from 0 to 1, in the order of token ids, and see into which piece the
# number falls (**inverse CDF**).
# %% [markdown] tr
# ## Sorun nerede?
#
# Aynı istek, aynı tohum (seed): 40 tokendan yalnızca 3'ü aynı çıkıyor, çünkü arada başka biri de çekti. Kimse bir
# yanıtı yeniden üretemez, hiçbir test iki çalıştırmayı karşılaştıramaz; kesilip yeniden hesaplanan bir istek de başka
# türlü devam eder.
#
# ## Yeni çözüm
#
# **Sayaç tabanlı** (counter-based) bir üretecin durumu yoktur. Bir fonksiyondur: Bir tokenın rastgele sayısı
# `uniform(seed, position)` olur; tohum isteğin tohumu, konum da isteğin kendi dizisindeki konumudur. Bir çekiliş için
# tek sayı yeter: Olasılıkları token kimliği sırasıyla 0'dan 1'e uzanan doğruya yan yana dizin ve sayının hangi
# parçaya düştüğüne bakın (**ters CDF**, inverse CDF).

# %%
from minipaged.sampling.philox import uniform

print([round(float(x), 3) for x in uniform([7, 7, 7, 8], [5, 6, 7, 5])])
assert uniform([7], [5]) == uniform([7, 3], [5, 9])[0]  # whoever else asks

# %% [exercise] sample
def sample(logits, temperature, top_k, top_p, u):
    """Draw one token (roughly 10 lines).

    Args:
        logits: float array [V].
        temperature: above 0; divides the logits.
        top_k: keep the top_k likeliest tokens, 1 <= top_k <= V; then the rest sums to one again.
        top_p: of these keep the likeliest, as few as reach top_p together (the one that crosses it is kept).
        u: float, 0 <= u < 1.

    Returns:
        int: the token i, in the order of ids, with cdf[i - 1] <= u < cdf[i]; the kept ones sum to one.
    """
    raise NotImplementedError

# %% [solution] sample
def sample(logits, temperature, top_k, top_p, u):
    scores = logits.astype(np.float64) / temperature
    p = np.exp(scores - scores.max())
    order = np.argsort(-p, kind="stable")  # likeliest first
    p[order[top_k:]] = 0
    p /= p.sum()
    reached = np.cumsum(p[order])
    p[order[np.searchsorted(reached, top_p) + 1 :]] = 0
    return int(np.searchsorted(np.cumsum(p) / p.sum(), u, side="right"))

# %% [check] sample
from tutorials.course import check
from tutorials.course.step06 import examine_sample

check("sample", examine_sample, sample)

# %% [wrong] sample: temperature 0\.5
def sample(logits, temperature, top_k, top_p, u, solution=sample):
    return solution(logits * temperature**2, temperature, top_k, top_p, u)  # multiplied, not divided

# %% [wrong] sample: the one that crosses it is kept
def sample(logits, temperature, top_k, top_p, u):
    p = softmax(logits / temperature)
    order = np.argsort(-p, kind="stable")
    p[order[top_k:]] = 0
    p /= p.sum()
    keep = np.cumsum(p[order]) <= top_p  # drops the one that crosses
    keep[0] = True
    p[order[~keep]] = 0
    return int(np.searchsorted(np.cumsum(p) / p.sum(), u, side="right"))

# %% [wrong] sample: sums to one again
def sample(logits, temperature, top_k, top_p, u):
    p = softmax(logits / temperature)
    order = np.argsort(-p, kind="stable")
    p[order[top_k:]] = 0
    p[order[np.searchsorted(np.cumsum(p[order]), top_p) + 1 :]] = 0  # before that, p no longer sums to one
    return int(np.searchsorted(np.cumsum(p) / p.sum(), u, side="right"))

# %% [wrong] sample: in the order of ids
def sample(logits, temperature, top_k, top_p, u):
    p = np.sort(softmax(logits / temperature))[::-1].copy()  # likeliest first, and so it stays
    order = np.argsort(-logits, kind="stable")
    p[top_k:] = 0
    p /= p.sum()
    p[np.searchsorted(np.cumsum(p), top_p) + 1 :] = 0
    return int(order[np.searchsorted(np.cumsum(p) / p.sum(), u, side="right")])

# %% [markdown] en
# ## In the engine
#
# A request with a seed, alone and in the middle of five others; the law of the engine is that nothing changes:
# %% [markdown] tr
# ## Motorda
#
# Tohumu olan bir istek, önce tek başına, sonra beş başka isteğin ortasında. Motorun yasası, hiçbir şeyin
# değişmemesidir:

# %%
from minipaged import LLM, SamplingParams

params = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=7, max_tokens=12)
with LLM("tiny", device="reference") as llm:
    (alone,) = llm.generate("ROMEO:\nI", params)
    others = [f"{name}:\nI" for name in ("JULIET", "MERCUTIO", "TYBALT", "NURSE", "PARIS")]
    together = llm.generate([*others[:3], "ROMEO:\nI", *others[3:]], params)
print(repr(alone.outputs[0].text))
print("in company the same:", together[3].outputs[0].token_ids == alone.outputs[0].token_ids)
assert together[3].outputs[0].token_ids == alone.outputs[0].token_ids

# %% [markdown] en
# ## What to read next
#
# - [`sampler.py`](../../minipaged/sampling/sampler.py): all steps from logits to a token, row by row, so that no row
#   sees another.
# - [`filters.py`](../../minipaged/sampling/filters.py): top-k and top-p without sorting the whole vocabulary.
# - [`philox.py`](../../minipaged/sampling/philox.py): the counter-based generator, ten rounds of multiplication.
# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`sampler.py`](../../minipaged/sampling/sampler.py): logitlerden tokena bütün adımlar; satır satır, hiçbir satır
#   ötekini görmeden.
# - [`filters.py`](../../minipaged/sampling/filters.py): bütün sözlüğü sıralamadan top-k ve top-p.
# - [`philox.py`](../../minipaged/sampling/philox.py): sayaç tabanlı üreteç, on tur çarpma.
