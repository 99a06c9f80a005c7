# %% [markdown] en
# # 08 · Chunked prefill, preemption and starvation
#
# **Goal.** Share out a step's **token budget** so that nobody waits forever: long prompts go in pieces beside the
# requests that are generating, and when the blocks run out, the right one yields. About 15 minutes.
#
# A request does two kinds of work. Its prompt is known from the start, so all its tokens can be computed in one step
# (**prefill**). After that it generates one token a step (**decode**). A step costs about as much as it has tokens.
# %% [markdown] tr
# # 08 · Parçalı ön doldurma, askıya alma ve açlık
#
# **Amaç.** Bir adımın **token bütçesini** (token budget) kimse sonsuza dek beklemeyecek biçimde paylaştırmak: Uzun
# istemler, üretim yapan isteklerin yanında parça parça ilerler; bloklar tükenince de doğru istek yer açar. Yaklaşık
# 15 dakika.
#
# Bir istek iki tür iş yapar. İstemi baştan bellidir, bu yüzden bütün tokenları tek adımda hesaplanabilir (**ön
# doldurma**, prefill). Ondan sonra her adımda bir token üretir (**çözme**, decode). Bir adımın maliyeti, aşağı yukarı
# içindeki token sayısı kadardır.

# %%
from tutorials.course import show
from tutorials.course.drawing import draw_grid
from tutorials.course.simulation import one_step, scheduler_for, submit

NUM_STEPS, PROMPT = 16, 48  # a prompt of 48 tokens arrives in every step from step 2 on


def draw(title, steps):
    """`steps`: for each a dict from request to its tokens. A row a request."""
    names = list(dict.fromkeys(name for step in steps for name in step))[:9]
    rows = {}
    for name in names:
        counts = [step.get(name) for step in steps]
        rows[name] = [None if count is None else (2 if count == 1 else 0, count) for count in counts]
    show(draw_grid(title, rows, cell=26, note="tokens of each request, a column a step; green: decode"), title)


# %% [markdown] en
# ## The naive version
#
# "A new prompt first": whoever arrives is computed at once and as a whole, then everybody goes on generating. Several
# engines began like this, since it needs only one kind of work in a step. One request generates, and then prompts
# keep arriving:
# %% [markdown] tr
# ## İlk akla gelen çözüm
#
# "Önce yeni istem": Gelen istek hemen ve bütünüyle hesaplanır, sonra herkes üretmeye devam eder. Bir adımda tek tür
# iş yeterli olduğu için birkaç motor böyle başladı. Bir istek üretim yapıyor, ardından istemler gelmeye başlıyor:

# %%
def prefill_first(num_steps):
    running, waiting, steps = ["chat"], [], [{"chat": 8}]
    for number in range(1, num_steps):
        if number >= 2:
            waiting.append(f"p{number}")
        if waiting:  # a step of prompts alone
            name = waiting.pop(0)
            steps.append({name: PROMPT})
            running.append(name)
        else:
            steps.append(dict.fromkeys(running, 1))
    return steps


naive = prefill_first(NUM_STEPS)
draw("A new prompt first", naive)
got = sum("chat" in step for step in naive[1:])
print("tokens that chat got in 15 steps:", got)
assert got == 1

# %% [markdown] en
# ## What hurts
#
# In 15 steps `chat` got one token: as long as prompts arrive, nobody generates. That is **starvation**. And even a
# single prompt of thousands of tokens makes everybody wait for one very long step.
#
# ## The new version
#
# There are no phases. Every request has tokens that are known and not yet computed: one, if it generates; many, if it
# is at its prompt. Each step has a budget, `max_num_batched_tokens`:
#
# 1. every request that generates gets its one token;
# 2. what is left goes to the prompts, in the order of arrival, as far as it reaches. A prompt may get a piece only:
#    **chunked prefill**.
# %% [markdown] tr
# ## Sorun nerede?
#
# `chat` 15 adımda tek bir token aldı: İstemler geldiği sürece kimse üretemez. Buna **açlık** (starvation) denir.
# Üstelik binlerce tokenlık tek bir istem bile herkesi çok uzun bir adım boyunca bekletir.
#
# ## Yeni çözüm
#
# Evre diye bir şey yok. Her isteğin bilinen ama henüz hesaplanmamış tokenları vardır: üretiyorsa bir, isteminde
# ilerliyorsa birçok. Her adımın bir bütçesi vardır, `max_num_batched_tokens`:
#
# 1. üreten her istek bir tokenını alır;
# 2. kalan, geliş sırasıyla yettiği kadar istemlere gider. Bir istem yalnızca bir parça alabilir: **parçalı ön
# doldurma** (chunked prefill).

# %%
def budgeted(num_steps, budget):
    scheduler = scheduler_for(max_num_seqs=16, max_num_batched_tokens=budget, num_blocks=256)
    submit(scheduler, "chat", 8, 60)
    steps = []
    for number in range(num_steps):
        if number >= 2:
            submit(scheduler, f"p{number}", PROMPT, 60)
        steps.append({s.request_id: len(s.token_ids) for s in one_step(scheduler).scheduled})
    return steps


fair = budgeted(NUM_STEPS, budget=32)
draw("A budget of 32 tokens", fair)
got = sum("chat" in step for step in fair[1:])
print("tokens that chat got in 15 steps:", got, " largest step:", max(sum(step.values()) for step in fair))
assert got == 15 and max(sum(step.values()) for step in fair) == 32

# %% [markdown] en
# `chat` gets a token in each of the 15 steps, no step has more than 32 tokens, and the prompts of 48 tokens are
# computed in pieces. The budget is the knob between the delay of those who generate and the speed at which prompts
# are read.
# %% [markdown] tr
# `chat` 15 adımın her birinde token alıyor, hiçbir adımda 32'den çok token yok, 48 tokenlık istemler de parça parça
# hesaplanıyor. Bütçe, üretenlerin gecikmesiyle istemlerin okunma hızı arasındaki ayar düğmesidir.

# %% [exercise] share_out
def share_out(uncomputed, budget):
    """How many tokens each request gets in a step (roughly 7 lines).

    Args:
        uncomputed: list of ints, at least 1: tokens known and not yet computed, by request, in the order of arrival.
            1 means that the request generates.
        budget: int, at least len(uncomputed).

    Returns:
        list of ints [len(uncomputed)]: 1 for each that generates; of what is left, each prompt in order as much as it
        can use, down to 0.
    """
    raise NotImplementedError

# %% [solution] share_out
def share_out(uncomputed, budget):
    left = budget - uncomputed.count(1)
    shares = []
    for count in uncomputed:
        share = 1 if count == 1 else min(count, left)
        if count > 1:
            left -= share
        shares.append(share)
    return shares

# %% [check] share_out
from tutorials.course import check


def examine_share_out(share_out):
    cases = [
        ([1, 1], 8, [1, 1], "who generates gets 1"),
        ([5, 1], 5, [4, 1], "the one that generates comes first, although it arrived later"),
        ([1, 50, 1], 16, [1, 14, 1], "a prompt may get a piece"),
        ([30, 30, 1], 40, [30, 9, 1], "prompts in the order of arrival, as much as they can use"),
    ]
    for uncomputed, budget, expected, why in cases:
        found = share_out(list(uncomputed), budget)
        assert found == expected, f"share_out({uncomputed}, {budget}) is {found}; it must be {expected}: {why}."
    # In the engine: requests arrive, and each step shares out what share_out says.
    scheduler = scheduler_for(max_num_seqs=16, max_num_batched_tokens=32, num_blocks=256)
    for number in range(12):
        submit(scheduler, str(number), 7 * number % 50 + 2, 60)
        requests = scheduler.running + scheduler.waiting
        uncomputed = [request.num_tokens - request.num_computed_tokens for request in requests]
        names = [request.request_id for request in requests]
        plan = {s.request_id: len(s.token_ids) for s in one_step(scheduler).scheduled}
        expected = [plan.get(name, 0) for name in names]
        found = share_out(list(uncomputed), 32)
        assert found == expected, f"share_out({uncomputed}, 32) is {found}; the engine's scheduler says {expected}."


check("share_out", examine_share_out, share_out)

# %% [wrong] share_out: share_out\(\[5, 1\], 5\) is \[5, 0\]
def share_out(uncomputed, budget):
    shares = []
    for count in uncomputed:  # plainly in order
        shares.append(min(count, budget))
        budget -= shares[-1]
    return shares

# %% [wrong] share_out: share_out\(\[5, 1\], 5\) is \[0, 1\]
def share_out(uncomputed, budget):
    left = budget - uncomputed.count(1)
    shares = []
    for count in uncomputed:
        share = 1 if count == 1 else count if count <= left else 0  # the whole prompt or nothing
        left -= share if count > 1 else 0
        shares.append(share)
    return shares

# %% [wrong] share_out: share_out\(\[5, 1\], 5\) is \[5, 1\]
def share_out(uncomputed, budget):
    shares = []
    left = budget  # those that generate are not counted
    for count in uncomputed:
        share = min(count, left) if count > 1 else 1
        left -= share if count > 1 else 0
        shares.append(share)
    return shares

# %% [wrong] share_out: share_out\(\[30, 30, 1\], 40\) is \[19, 19, 1\]
def share_out(uncomputed, budget):
    prompts = sum(count > 1 for count in uncomputed)
    each = (budget - uncomputed.count(1)) // max(prompts, 1)  # equal parts
    return [1 if count == 1 else min(count, each) for count in uncomputed]

# %% [markdown] en
# ## When the blocks run out
#
# Tokens are one budget, blocks are the other. Requests are admitted when the blocks for their prompt are free, but
# they grow, and at some time a running request needs a block and there is none. Then one must yield: **preemption**
# takes all blocks of the request that arrived last. It goes back to the queue and later computes its tokens again,
# prompt and output in one prefill.
#
# Three requests, in a pool of 10 blocks that cannot hold them all to the end:
# %% [markdown] tr
# ## Bloklar tükenince
#
# Tokenlar bir bütçedir, bloklar öteki. İstekler, istemlerine yetecek blok boşken kabul edilir; ama büyürler ve bir an
# gelir, çalışan bir isteğe blok gerekir, boş blok kalmamıştır. O zaman biri yer açmalıdır: **Askıya alma**
# (preemption), en son gelen isteğin bütün bloklarını alır. İstek kuyruğa döner ve ileride tokenlarını yeniden
# hesaplar; istemi ve çıktısı tek bir ön doldurmayla.
#
# Üç istek, hepsini sonuna dek taşıyamayacak 10 blokluk bir havuzda:

# %%
from minipaged import LLM, SamplingParams
from minipaged.view import draw_timeline

prompts = [[51, 53, 50, 54, 51, 443, 50, 29], [459, 686, 927, 29, 202, 761, 330, 271], [57, 675, 693, 29, 202, 398, 92, 606]]
params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def generate(num_blocks):
    options = {"block_size": 4, "max_model_len": 40, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    with LLM("tiny", device="reference", num_blocks=num_blocks, enable_prefix_caching=False, **options) as llm:
        llm.start_trace()
        outputs = llm.generate(prompts, params)
        return llm.stop_trace(), [output.outputs[0].token_ids for output in outputs], llm.stats().num_preemptions


trace, tokens, num_preemptions = generate(num_blocks=10)
roomy_trace, expected, none = generate(num_blocks=64)
show(draw_timeline(trace, "Three requests, 10 blocks"), "the two later requests are preempted and computed again")
print("preemptions:", num_preemptions, " steps:", len(trace), "instead of", len(roomy_trace))
print("same tokens:", tokens == expected)
assert (num_preemptions, none) == (2, 0) and tokens == expected
assert (len(trace), len(roomy_trace)) == (30, 16)

# %% [markdown] en
# 30 steps instead of 16, but the tokens are the same: preemption costs time, never correctness.
#
# Why can nobody starve? Requests stay in their order of arrival, and the one that yields is always the last. So the
# oldest request advances in every step, whatever happens; it ends some day, and then the next one is the oldest. A
# request that the pool could not hold even alone is refused at once, with the numbers, and does not block the others.
# %% [markdown] tr
# 16 yerine 30 adım, ama tokenlar aynı: Askıya alma zaman kaybettirir, doğruluğu asla bozmaz.
#
# Neden kimse aç kalmaz? İstekler geliş sırasını korur ve yer açan hep sonuncudur. Yani ne olursa olsun en eski istek
# her adımda ilerler; günün birinde biter, o zaman en eski istek sıradaki olur. Havuzun tek başınayken bile
# taşıyamayacağı bir istek ise hemen, sayılarıyla birlikte reddedilir ve ötekileri engellemez.

# %%
from minipaged.errors import PoolTooSmallError

with LLM("tiny", device="reference", num_blocks=4, block_size=4) as llm:
    try:
        llm.generate([prompts[0]], params)
    except PoolTooSmallError as error:
        print("refused:", error)
        refused = True
assert refused

# %% [markdown] en
# ## What to read next
#
# - [`scheduler.py`](../../minipaged/core/scheduler.py): `_continue_running` is your `share_out`, `_make_room` preempts.
# - [`admission.py`](../../minipaged/core/admission.py): which requests could never finish.
# - [`swap.py`](../../minipaged/core/swap.py): instead of computing again, the blocks may wait in host memory.
# - [`test_scheduler_random.py`](../../tests/core/test_scheduler_random.py): random traces, and a bound for the wait
#   of everyone.
# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`scheduler.py`](../../minipaged/core/scheduler.py): `_continue_running` sizin `share_out`'unuzdur, askıya alan
#   ise `_make_room`.
# - [`admission.py`](../../minipaged/core/admission.py): hangi istekler hiçbir zaman bitemez?
# - [`swap.py`](../../minipaged/core/swap.py): yeniden hesaplamak yerine bloklar ana bellekte de bekleyebilir.
# - [`test_scheduler_random.py`](../../tests/core/test_scheduler_random.py): rastgele senaryolar ve herkesin
#   beklemesine bir üst sınır.
