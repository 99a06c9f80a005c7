# %% [markdown] en
# # 17 · A day in production
#
# **Goal.** Watch an engine that gets more work than it can hold: an urgent request overtakes, two users go away, four
# requests are nonsense. Read from its statistics what happens, and what to change. About 15 minutes. You need steps
# 07 and 08 (batching, preemption) and 10 (prefix cache).

# %% [markdown] tr
# # 17 · Üretimde bir gün
#
# **Amaç.** Taşıyabileceğinden fazla iş alan bir motoru izlemek: acil bir istek öne geçiyor, iki kullanıcı vazgeçiyor,
# dört istek de saçma. Olan biteni ve neyin değiştirilmesi gerektiğini istatistiklerinden okumak. Yaklaşık 15 dakika.
# Önkoşul: 07 ve 08 (yığınlama, askıya alma) ile 10 (önek önbelleği).

# %%
import time

import numpy as np

from minipaged import LLM, Engine, EngineConfig, EngineStats, SamplingParams
from minipaged.errors import MinipagedError
from minipaged.view import draw_blocks, draw_timeline
from tutorials.course import check, show

LIMITS = dict(
    num_blocks=24, block_size=16, max_num_seqs=8, max_num_batched_tokens=64, device="reference", num_threads=1
)
rng = np.random.default_rng(17)
prompts = [rng.integers(10, 1000, rng.integers(16, 48)).tolist() for _ in range(12)]
lengths = [int(n) for n in rng.integers(40, 90, 12)]
needed = sum(-(-(len(prompt) + n) // 16) for prompt, n in zip(prompts, lengths, strict=True))
urgent = rng.integers(10, 1000, 60).tolist()
print("12 requests need", needed, "blocks; the pool has 24")
assert needed == 68

# %% [markdown] en
# ## Overload, first come, first served
#
# Twelve requests arrive at once, nearly three times what the pool holds. An engine must not fall over then, nor
# starve anybody: whoever does not fit waits; whoever runs and finds no block preempts the one that came last. After 8
# steps an **urgent** request arrives: a person waits in front of a screen, the others are a nightly job.

# %% [markdown] tr
# ## Aşırı yük: ilk gelen ilk hizmeti alır
#
# On iki istek birden geliyor; havuzun alabileceğinin neredeyse üç katı. Motor bu durumda ne çökmeli ne de kimseyi aç
# bırakmalı: sığmayan bekler; çalışırken blok bulamayan, en son geleni askıya alır (preemption). 8 adım sonra **acil**
# bir istek geliyor: birisi ekran başında bekliyor, ötekiler bir gece işi.

# %%
def run_day(policy, cancel=()):
    """Run the day to its end; the step in which each request had its first token, all statistics, and the trace."""
    engine = Engine(EngineConfig("tiny", **LIMITS, policy=policy))
    engine.start_trace()

    def add(name, prompt, num_tokens, priority):
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        engine.add_request(prompt, params, request_id=name, priority=priority, stream=True)

    for number, (prompt, num_tokens) in enumerate(zip(prompts, lengths, strict=True)):
        add(f"night-{number}", prompt, num_tokens, priority=1)
    first_token, history, finished = {}, [engine.stats()], []
    while engine.has_unfinished():
        step = len(history)
        if step == 8:
            add("urgent", urgent, 12, priority=0)
        if step == 16:
            for name in cancel:
                engine.abort(name)
        for output in engine.step():
            first_token.setdefault(output.request_id, step)
            if output.finished:
                finished.append(output.request_id)
        history.append(engine.stats())
    return first_token, history, finished, engine.stop_trace()


first_token, history, finished, trace = run_day("fcfs")
fcfs_wait = first_token["urgent"] - 8
fullest = max(stats.num_blocks_used for stats in history)
print("the urgent request waits", fcfs_wait, "steps")
print(len(finished), "requests finished in", history[-1].num_steps, "steps")
print("preemptions:", history[-1].num_preemptions, " most blocks used:", fullest)
assert len(finished) == 13 and fullest == 24
show(draw_timeline(trace), "requests join and leave the batch; the urgent one comes late")

# %% [markdown] en
# Everybody finishes, although the pool was full. But the urgent request had to wait for nearly all that came before
# it.
#
# ## New: priorities
#
# With `policy="priority"` a lower number runs first. If there is no room, a strictly less urgent request is
# preempted; its tokens are not lost, only computed again later.

# %% [markdown] tr
# Havuz dolu olduğu hâlde herkes bitiriyor. Ama acil istek, kendinden önce gelenlerin neredeyse hepsini beklemek
# zorunda kaldı.
#
# ## Yeni çözüm: öncelikler
#
# `policy="priority"` ile küçük sayı önce çalışır. Yer yoksa, ondan daha az acil bir istek askıya alınır; tokenları
# kaybolmaz, yalnızca sonra yeniden hesaplanır.

# %%
first_token, history, finished, trace = run_day("priority", cancel=["night-3", "night-11"])
priority_wait = first_token["urgent"] - 8
print("the urgent request waits", priority_wait, "steps")
print(len(finished), "requests finished in", history[-1].num_steps, "steps")
print("preemptions:", history[-1].num_preemptions)
assert priority_wait < 2 < fcfs_wait
assert "night-3" in first_token and "night-11" not in first_token  # one was running, one was waiting
assert "night-3" not in finished and "night-11" not in finished and len(finished) == 11
assert history[-1].num_preemptions > 0
assert history[-1].num_blocks_used == 0  # whoever was cancelled left nothing behind
show(draw_timeline(trace), "the urgent request starts at once; two requests end early")

# %%
fullest = max(range(len(trace)), key=lambda step: history[step + 1].num_blocks_used)
show(draw_blocks(trace.at(fullest)), "the fullest moment of the day")

# %% [markdown] en
# Two users cancelled at step 16: one was running, one was still waiting. Whatever they held was free in the same
# moment.
#
# ## Bad requests fail alone
#
# Each of these is refused when it is submitted, with the number seen, the limit and the remedy. Nothing of the engine
# has changed, and the good request beside them never notices. From here on we use `LLM`, as a program would.

# %% [markdown] tr
# İki kullanıcı 16. adımda vazgeçti: biri çalışıyor, öteki hâlâ bekliyordu. Tuttukları bloklar o anda boşaldı.
#
# ## Kötü istekler yalnızca kendileri başarısız olur
#
# Aşağıdakilerin her biri, gönderildiği anda, görülen sayı, sınır ve çare söylenerek geri çevrilir. Motorda hiçbir şey
# değişmez, yanlarındaki iyi istek bunu fark bile etmez. Buradan sonra, bir programın yapacağı gibi `LLM`
# kullanıyoruz.

# %%
bad = {
    "too long": ("ROMEO:", dict(max_tokens=5000)),
    "no such token": ([5, 1_000_000], dict(max_tokens=4)),
    "never fits": ("ROMEO:", dict(max_tokens=400)),
    "a typo": ("ROMEO:", dict(max_token=4)),
}
llm = LLM("tiny", **LIMITS)
good = llm.stream("JULIET:", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
next(good)  # it runs
for name, (prompt, options) in bad.items():
    try:
        llm.generate(prompt, SamplingParams(**options))
    except MinipagedError as error:
        print(f"{name}: {type(error).__name__}: {error}")
    else:
        raise AssertionError(f"{name} was accepted")
*_, last = good
assert last.finished and len(last.outputs[0].token_ids) == 24

# %% [markdown] en
# A stream that is left early cancels its request: leaving the loop is enough.

# %% [markdown] tr
# Yarıda bırakılan bir akış (stream) isteğini iptal eder: döngüden çıkmak yeter.

# %%
for output in llm.stream("ROMEO:", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)):
    if len(output.outputs[0].token_ids) >= 5:
        break
del output
while llm.stats().num_requests_running:
    time.sleep(0.01)  # the engine's thread hears of it between two steps
stats = llm.stats()
print("running", stats.num_requests_running, " blocks in use", stats.num_blocks_used)
assert stats.num_blocks_used == 0

# %% [markdown] en
# ## Reading the statistics
#
# `LLM.stats()` has two kinds of numbers. **Counters** grow since the engine was made (`num_steps`,
# `num_generated_tokens`, `num_preemptions`, …). **Gauges** tell about this moment (`num_requests_waiting`,
# `num_blocks_used`, …). A dashboard asks every few seconds, and what it wants to know is about the time **between**
# two answers.
#
# ## Exercise: what happened between two answers

# %% [markdown] tr
# ## İstatistikleri okumak
#
# `LLM.stats()` iki tür sayı verir. **Sayaçlar** (counter) motor kurulduğundan beri büyür (`num_steps`,
# `num_generated_tokens`, `num_preemptions`, …). **Göstergeler** (gauge) o anı anlatır (`num_requests_waiting`,
# `num_blocks_used`, …). Bir izleme panosu birkaç saniyede bir sorar; bilmek istediği de iki yanıt **arasında** geçen
# süredir.
#
# ## Alıştırma: iki yanıt arasında ne oldu?

# %% [exercise] between
def between(before, after):
    """What a dashboard shows for the time between two EngineStats.

    before, after   EngineStats of the same engine, before first
    returns         dict:
      "tokens_per_step"  generated tokens a step, in this time; 0.0 if there was no step
      "hit_rate"         share of this time's prompt tokens (computed and cached) that were cached; 0.0 if none
      "preemptions"      how many there were in this time
      "occupancy"        share of all blocks that are in use at the end of it
    (roughly 10 lines)
    """
    raise NotImplementedError


# %% [solution] between
def between(before, after):
    def grown(name):
        return getattr(after, name) - getattr(before, name)

    steps = grown("num_steps")
    cached = grown("num_prompt_tokens_cached")
    prompt = cached + grown("num_prompt_tokens_computed")
    return {
        "tokens_per_step": grown("num_generated_tokens") / steps if steps else 0.0,
        "hit_rate": cached / prompt if prompt else 0.0,
        "preemptions": grown("num_preemptions"),
        "occupancy": after.num_blocks_used / after.num_blocks_total,
    }


# %% [check] between
def check_between(between):
    before = EngineStats(
        num_steps=100, num_generated_tokens=1000, num_prompt_tokens_computed=900, num_prompt_tokens_cached=100,
        num_preemptions=7, num_blocks_used=30, num_blocks_total=40,
    )  # fmt: skip
    after = EngineStats(
        num_steps=110, num_generated_tokens=1050, num_prompt_tokens_computed=950, num_prompt_tokens_cached=250,
        num_preemptions=9, num_blocks_used=10, num_blocks_total=40,
    )  # fmt: skip
    found = between(before, after)
    wanted = {"tokens_per_step": 5.0, "hit_rate": 0.75, "preemptions": 2, "occupancy": 0.25}
    assert set(found) == set(wanted), f"the keys must be {sorted(wanted)}; yours are {sorted(found)}"
    hints = {
        "tokens_per_step": "50 tokens in 10 steps: a counter's growth, not its total",
        "hit_rate": "150 of this time's 200 prompt tokens were cached; the lifetime rate would hide it",
        "preemptions": "7 before and 9 after",
        "occupancy": "10 of 40 blocks at the end: a gauge is read, not subtracted",
    }
    for name, value in wanted.items():
        assert abs(found[name] - value) < 1e-9, f"{name} is {found[name]}, not {value} ({hints[name]})"
    try:
        idle = between(after, after)
    except ZeroDivisionError:
        raise AssertionError("nothing happened between two equal answers, and your division by zero did") from None
    assert idle["tokens_per_step"] == 0 and idle["hit_rate"] == 0, f"an idle engine: rates of 0, not {idle}"


check("between", check_between, between)


# %% [wrong] between: a counter's growth, not its total
def between(before, after):  # everything since the engine was made
    return {
        "tokens_per_step": after.num_generated_tokens / after.num_steps,
        "hit_rate": after.prefix_cache_hit_rate,
        "preemptions": after.num_preemptions,
        "occupancy": after.num_blocks_used / after.num_blocks_total,
    }


# %% [wrong] between: the lifetime rate would hide it
def between(before, after):  # the ready-made property is of the engine's whole life
    return {
        "tokens_per_step": (after.num_generated_tokens - before.num_generated_tokens)
        / max(after.num_steps - before.num_steps, 1),
        "hit_rate": after.prefix_cache_hit_rate,
        "preemptions": after.num_preemptions - before.num_preemptions,
        "occupancy": after.num_blocks_used / after.num_blocks_total,
    }


# %% [wrong] between: a gauge is read, not subtracted
def between(before, after):  # subtracts everything
    cached = after.num_prompt_tokens_cached - before.num_prompt_tokens_cached
    computed = after.num_prompt_tokens_computed - before.num_prompt_tokens_computed
    return {
        "tokens_per_step": (after.num_generated_tokens - before.num_generated_tokens)
        / max(after.num_steps - before.num_steps, 1),
        "hit_rate": cached / max(cached + computed, 1),
        "preemptions": after.num_preemptions - before.num_preemptions,
        "occupancy": (after.num_blocks_used - before.num_blocks_used) / after.num_blocks_total,
    }


# %% [wrong] between: your division by zero did
def between(before, after):  # never idle
    cached = after.num_prompt_tokens_cached - before.num_prompt_tokens_cached
    computed = after.num_prompt_tokens_computed - before.num_prompt_tokens_computed
    return {
        "tokens_per_step": (after.num_generated_tokens - before.num_generated_tokens)
        / (after.num_steps - before.num_steps),
        "hit_rate": cached / (cached + computed),
        "preemptions": after.num_preemptions - before.num_preemptions,
        "occupancy": after.num_blocks_used / after.num_blocks_total,
    }


# %% [markdown] en
# ## The day, as an operator sees it
#
# The same kind of numbers for our day with priorities, every 20 steps:

# %% [markdown] tr
# ## Gün, sistem yöneticisinin gözünden
#
# Öncelikli günümüzün aynı türden sayıları, 20 adımda bir:

# %%
print("steps      waiting running  tokens/step  blocks used  preemptions")
for before, after in zip(history[::20], [*history[20::20], history[-1]], strict=False):
    steps = after.num_steps - before.num_steps
    if steps:
        per_step = (after.num_generated_tokens - before.num_generated_tokens) / steps
        waiting, running = after.num_requests_waiting, after.num_requests_running
        row = f"{before.num_steps:>3}-{after.num_steps:<6} {waiting:>6} {running:>7}"
        preempted = after.num_preemptions - before.num_preemptions
        print(f"{row} {per_step:>11.1f} {after.num_blocks_used:>9} / {after.num_blocks_total} {preempted:>10}")
llm.close()

# %% [markdown] en
# How to read such a table:
#
# - **Preemptions again and again, all blocks used**: the pool is too small for what runs at once. Raise `num_blocks`
#   (or `kv_cache_memory`), lower `max_num_seqs`, or choose a smaller `kv_cache_dtype`.
# - **Many waiting, blocks free**: `max_num_seqs` or `max_num_batched_tokens` is the limit.
# - **Hit rate falls while `num_blocks_evicted` grows**: prefixes are evicted before they are wanted again.
# - **Few tokens a step, nobody waiting**: there is room for more users; for one user alone, see step 11.
#
# ## What to read next
#
# - [`scheduler.py`](../../minipaged/core/scheduler.py): `_preempt_for_urgent`, `_make_room` and `abort`.
# - [`admission.py`](../../minipaged/core/admission.py): who can never finish, and is told so.
# - [`outputs.py`](../../minipaged/outputs.py): every field of `EngineStats`;
#   [`errors.py`](../../minipaged/errors.py).
# - [`test_everything_together.py`](../../tests/equivalence/test_everything_together.py): days far worse than this
#   one, and every token is still what it would have been alone.
#
# This was the last step. You have seen every layer of the engine; [the tree in README](../../README.md) says where
# the rest is.

# %% [markdown] tr
# Böyle bir tablo nasıl okunur:
#
# - **Durmadan askıya alma, bütün bloklar dolu**: havuz, aynı anda çalışanlar için küçük. `num_blocks` değerini (ya da
#   `kv_cache_memory`'yi) yükseltin, `max_num_seqs`'i düşürün veya daha küçük bir `kv_cache_dtype` seçin.
# - **Bekleyen çok, boş blok var**: sınır `max_num_seqs` ya da `max_num_batched_tokens`.
# - **İsabet oranı düşerken `num_blocks_evicted` büyüyor**: önekler, yeniden istenmeden tahliye ediliyor.
# - **Adım başına az token, bekleyen yok**: daha çok kullanıcıya yer var; tek kullanıcı için adım 11'e bakın.
#
# ## Sırada ne okumalı?
#
# - [`scheduler.py`](../../minipaged/core/scheduler.py): `_preempt_for_urgent`, `_make_room` ve `abort`.
# - [`admission.py`](../../minipaged/core/admission.py): kim asla bitiremez ve bu kendisine nasıl söylenir.
# - [`outputs.py`](../../minipaged/outputs.py): `EngineStats`'ın bütün alanları;
#   [`errors.py`](../../minipaged/errors.py).
# - [`test_everything_together.py`](../../tests/equivalence/test_everything_together.py): bundan çok daha kötü günler;
#   yine de her token, tek başına üretilseydi ne olacaksa odur.
#
# Son adım buydu. Motorun bütün katmanlarını gördünüz; gerisinin nerede olduğunu [README'deki ağaç](../../README.md)
# söyler.
