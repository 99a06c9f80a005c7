# %% [markdown] en
# # 11 · Speculative decoding
#
# **Goal.** More than one token a step for a single user, without changing one token of the output. About 12 minutes.
# You need step 06 (sampling) and, for the rollback, 03 (block tables).

# %% [markdown] tr
# # 11 · Spekülatif çözme
#
# **Amaç.** Tek kullanıcı için, çıktının tek bir tokenını bile değiştirmeden adım başına birden çok token üretmek.
# Yaklaşık 12 dakika. Önkoşul: 06 (örnekleme) ve geri alma kısmı için 03 (blok tabloları).

# %%
import time

from minipaged import LLM, Engine, EngineConfig, SamplingParams
from minipaged.sampling.speculative.ngram import NgramIndex
from minipaged.view import draw_timeline
from tutorials.course import check, show

OPTIONS = dict(device="reference", num_threads=1, num_blocks=32, block_size=16)

# %% [markdown] en
# ## Naive: one step, one token
#
# A step reads every weight of the model once, whether it computes one token or eight. For one user that is a waste:
# the arithmetic units wait for memory. We can see it without any special tool. Computing 8 tokens *of a prompt* is
# one step; generating 8 tokens is 8 steps.

# %% [markdown] tr
# ## İlk akla gelen çözüm: bir adım, bir token
#
# Bir adım, ister bir token ister sekiz token hesaplasın, modelin bütün ağırlıklarını bir kez okur. Tek kullanıcı için
# bu israftır: aritmetik birimler belleği bekler. Bunu özel bir araç olmadan da görebiliriz. Bir *istemin* 8 tokenını
# hesaplamak tek adımdır; 8 token üretmek ise 8 adım.

# %% [varies]
engine = Engine(EngineConfig("tiny", **OPTIONS, enable_prefix_caching=False))


def seconds(num_prompt, num_output):
    """The best of five runs, from a prompt of so many tokens to so many generated ones."""
    best = 9e9
    for _ in range(5):
        started = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
        engine.add_request(list(range(20, 20 + num_prompt)), params)
        while engine.has_unfinished():
            engine.step()
        best = min(best, time.perf_counter() - started)
    return best


together, in_turn = seconds(8, 1), seconds(1, 8)
print(f"8 tokens in one step {1e3 * together:.1f} ms, in 8 steps {1e3 * in_turn:.1f} ms")
assert together < in_turn

# %% [markdown] en
# Eight tokens at once cost less than eight in turn. But to compute token 5 we must know token 4, and it is not there
# yet. Unless we **guess** it.
#
# ## New: guess, compute all at once, keep what was right
#
# ```
# t  │ d0   d1   d2
# x0   x1   x2   x3
# ```
#
# `t` is the last known token and `d0 d1 d2` are three guesses behind it. One step computes all four, and `x0` to `x3`
# are what the model itself says at each position. If `d0` equals `x0`, then `x1` counts; if `d1` equals `x1` too,
# then `x2` counts; and so on. The model's own tokens x are kept up to and including the first one that a guess
# missed. A wrong guess costs a little arithmetic; it can never change the output, for every token that is kept was
# sampled by the model itself, from the logits it would have seen anyway.
#
# Who guesses? A small *draft model*, or nobody: **prompt lookup** proposes what followed the last few tokens when
# they occurred before. This is the engine's own index:

# %% [markdown] tr
# Sekiz tokenı birlikte hesaplamak, tek tek hesaplamaktan ucuz. Ama 5. tokenı hesaplamak için 4. tokenı bilmemiz
# gerekir, o da henüz yok. Tek çare var: **tahmin etmek**.
#
# ## Yeni çözüm: tahmin et, hepsini birden hesapla, doğru çıkanları tut
#
# ```
# t  │ d0   d1   d2
# x0   x1   x2   x3
# ```
#
# `t` bilinen son token, `d0 d1 d2` de onun arkasındaki üç tahmindir. Bir adım dördünü birden hesaplar; `x0`, …, `x3`
# modelin her konumda kendi söylediğidir. `d0` ile `x0` aynıysa `x1` geçerlidir; `d1` ile `x1` de aynıysa `x2`
# geçerlidir; böyle sürer. Modelin kendi tokenları (x), bir tahminin ilk kez tutmadığı yere kadar, o yerdeki de dahil
# olmak üzere tutulur. Yanlış tahmin biraz fazladan aritmetiğe mal olur ama çıktıyı asla değiştiremez: tutulan her
# tokenı modelin kendisi, zaten göreceği logitlerden örneklemiştir.
#
# Peki kim tahmin eder? Küçük bir *taslak model* (draft model) ya da hiç kimse: **istemde arama** (prompt lookup), son
# birkaç token daha önce geçtiğinde arkasından ne geldiyse onu önerir. Motorun kendi dizini:

# %%
index = NgramIndex()
tokens = [7, 8, 9, 4, 5, 1, 7, 8]
index.update(tokens)
print("after 7, 8 came", index.continuation(tokens, 3))
assert index.continuation(tokens, 3) == [9, 4, 5]

# %% [markdown] en
# ## Exercise: which tokens are kept
#
# `sampled` has one token more than `guesses`: the model also says what comes behind the last guess.

# %% [markdown] tr
# ## Alıştırma: hangi tokenlar tutulur
#
# `sampled`, `guesses`'tan bir token uzundur: model son tahminin arkasından ne geleceğini de söyler.

# %% [exercise] kept_tokens
def kept_tokens(guesses, sampled):
    """The tokens that a step adds to the output.

    guesses   list of int [k]       proposed tokens, for the next k positions
    sampled   list of int [k + 1]   the model's own token at each of these positions and at the one after;
                                    sampled[i] is meaningful only if guesses[:i] were all right
    returns   list of int, 1 to k + 1 of them
    (roughly 6 lines)
    """
    raise NotImplementedError


# %% [solution] kept_tokens
def kept_tokens(guesses, sampled):
    kept = [sampled[0]]
    for guess, following in zip(guesses, sampled[1:], strict=True):
        if guess != kept[-1]:
            break
        kept.append(following)
    return kept


# %% [check] kept_tokens
def check_kept_tokens(kept_tokens):
    kept = kept_tokens([4, 5, 6], [4, 5, 6, 7])
    assert kept == [4, 5, 6, 7], f"all three guesses are right, so the token behind them is known as well: {kept}"
    kept = kept_tokens([4, 9, 6], [4, 5, 6, 7])
    assert kept != [4, 9], "at the second position the model says 5; the wrong guess 9 must not be in the output"
    assert kept == [4, 5], (
        f"guess 9 is wrong (the model says 5). What follows was computed behind a wrong token: keep [4, 5], not {kept}"
    )
    kept = kept_tokens([9, 5], [4, 5, 6])
    assert kept == [4], f"the first guess is wrong already; the model's own first token, 4, is kept: [4], not {kept}"
    kept = kept_tokens([], [4])
    assert kept == [4], f"without guesses a step gives one token, [4], as it always did; you returned {kept}"


check("kept_tokens", check_kept_tokens, kept_tokens)


# %% [wrong] kept_tokens: the token behind them is known as well
def kept_tokens(guesses, sampled):  # forgets the token behind the last right guess
    kept = []
    for guess, token in zip(guesses, sampled, strict=False):
        kept.append(token)
        if guess != token:
            break
    return kept


# %% [wrong] kept_tokens: the wrong guess 9 must not be in the output
def kept_tokens(guesses, sampled):  # keeps guesses instead of the model's tokens
    kept = []
    for guess, token in zip(guesses, sampled, strict=False):
        kept.append(guess)
        if guess != token:
            return kept
    return kept + [sampled[-1]]


# %% [wrong] kept_tokens: computed behind a wrong token
def kept_tokens(guesses, sampled):  # drops wrong guesses, but goes on behind them
    triples = zip(guesses, sampled, sampled[1:], strict=False)
    return [sampled[0]] + [following for guess, token, following in triples if guess == token]


# %% [markdown] en
# ## In the engine
#
# Text that repeats itself is where lookup shines. The same request, plain and with at most four guesses a step. Bars
# mark the steps.

# %% [markdown] tr
# ## Motorda
#
# İstemde arama, kendini tekrarlayan metinlerde parlar. Aynı istek, önce düz, sonra adım başına en çok dört tahminle.
# Dikey çizgiler adımları ayırıyor.

# %%
PROMPT = "ROMEO:\n" + 2 * "O, she doth teach the torches to burn bright!\n" + "O, she doth teach"
NUM_OUTPUT = 64


def generate(params, **options):
    """The text step by step, the counters, and a trace."""
    with LLM("tiny", **OPTIONS, **options) as llm:
        llm.start_trace()
        pieces = [output.outputs[0].delta for output in llm.stream(PROMPT, params)]
        return pieces, llm.stats(), llm.stop_trace()


SPECULATION = dict(speculative_model="ngram", num_speculative_tokens=4, adaptive_speculation=False)
greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT)
plain, plain_stats, _ = generate(greedy)
guessed, stats, trace = generate(greedy, **SPECULATION)
print("|".join(guessed))
print("steps:", plain_stats.num_steps, "plain,", stats.num_steps, "with guesses")
print(f"guessed {stats.num_tokens_guessed}, right {stats.num_tokens_accepted}")
assert plain_stats.num_steps == NUM_OUTPUT == 64
assert "".join(guessed) == "".join(plain)  # not one character differs
assert stats.num_steps < 48
assert stats.num_steps == NUM_OUTPUT - stats.num_tokens_accepted  # each right guess saves a step
show(draw_timeline(trace), "steps of one request; some give it several tokens")

# %% [markdown] en
# Each right guess saved exactly one step. It works for sampling too, since the engine's random numbers are a function
# of (seed, position): the model draws at each position with the number it would have used anyway. Guesses hit less
# often there, for a sampled token is often not the one that came last time.

# %% [markdown] tr
# Doğru çıkan her tahmin tam bir adım kazandırdı. Yöntem örneklemede de işler; çünkü motorun rastgele sayıları (tohum,
# konum) ikilisinin bir fonksiyonudur: model her konumda, zaten kullanacağı sayıyla çeker. Orada tahminler daha seyrek
# tutar, çünkü örneklenen token çoğu zaman geçen sefer gelen token değildir.

# %%
sampled = SamplingParams(temperature=0.7, seed=1, max_tokens=NUM_OUTPUT)
plain, _, _ = generate(sampled)
guessed, stats_sampled, _ = generate(sampled, **SPECULATION)
print(f"guessed {stats_sampled.num_tokens_guessed}, right {stats_sampled.num_tokens_accepted}")
assert "".join(guessed) == "".join(plain)
assert stats_sampled.acceptance_rate < stats.acceptance_rate

# %% [markdown] en
# ## What happens to wrong guesses' KV
#
# Their KV was written into slots behind the known tokens. Nothing is erased: `num_computed_tokens` just does not
# count them, blocks that only they needed are given back (`BlockTable.truncate`), and the next step writes over the
# rest. And when guesses do not pay, the engine stops guessing (`adaptive_speculation`): README's table under
# "Speculation" has the rows where speculation loses, too.
#
# ## What to read next
#
# - [`verification.py`](../../minipaged/sampling/speculative/verification.py): your exercise, for all sequences
#   together.
# - [`lookahead.py`](../../minipaged/core/lookahead.py): guesses take only what a step leaves over.
# - [`ngram.py`](../../minipaged/sampling/speculative/ngram.py),
#   [`draft_model.py`](../../minipaged/sampling/speculative/draft_model.py),
#   [`adaptive.py`](../../minipaged/sampling/speculative/adaptive.py): who guesses, and how far ahead.
#
# Next: [12, making it fast on a CPU](12_fast_on_a_cpu.ipynb).

# %% [markdown] tr
# ## Yanlış tahminlerin KV'sine ne olur
#
# Onların KV'si, bilinen tokenların arkasındaki yuvalara yazılmıştı. Hiçbir şey silinmez: `num_computed_tokens` onları
# saymaz, yalnızca onların gerektirdiği bloklar geri verilir (`BlockTable.truncate`), kalanının üzerine de sonraki
# adım yazar. Tahmin kazandırmıyorsa motor tahmin etmeyi bırakır (`adaptive_speculation`): README'deki "Speculation"
# tablosunda spekülasyonun kaybettirdiği satırlar da vardır.
#
# ## Sırada ne okumalı?
#
# - [`verification.py`](../../minipaged/sampling/speculative/verification.py): alıştırmanız, bütün diziler için
#   birden.
# - [`lookahead.py`](../../minipaged/core/lookahead.py): tahminler yalnızca adımdan artanı kullanır.
# - [`ngram.py`](../../minipaged/sampling/speculative/ngram.py),
#   [`draft_model.py`](../../minipaged/sampling/speculative/draft_model.py),
#   [`adaptive.py`](../../minipaged/sampling/speculative/adaptive.py): kim, ne kadar ileriyi tahmin eder.
#
# Sonraki adım: [12, CPU'da hızlandırma](12_fast_on_a_cpu.ipynb).
