# %% [markdown] en
# # 07 · Static and continuous batching
#
# **Goal.** See why a batch that waits for its slowest member wastes half of the machine, and schedule step by step
# instead. About 10 minutes.
#
# A step of the model reads all weights once, whether for one sequence or for many. So sequences are computed
# together, in a **batch**; every step gives each of them one token. The question of this step is who is in the batch,
# and when that may change.
# %% [markdown] tr
# # 07 · Statik ve sürekli yığınlama
#
# **Amaç.** En yavaş üyesini bekleyen bir yığının makinenin neden yarısını boşa harcadığını görmek ve bunun yerine
# adım adım zamanlamak. Yaklaşık 10 dakika.
#
# Modelin bir adımı, ister tek bir dizi için ister birçok dizi için olsun, bütün ağırlıkları bir kez okur. Bu yüzden
# diziler bir arada, bir **yığın** (batch) hâlinde hesaplanır; her adım her birine bir token verir. Bu bölümün sorusu
# şu: Yığında kim var ve bu ne zaman değişebilir?

# %%
from tutorials.course import show
from tutorials.course.drawing import draw_grid
from tutorials.course.simulation import one_step, scheduler_for, submit

SEATS = 4
num_output_tokens = {"a": 4, "b": 24, "c": 6, "d": 10, "e": 5, "f": 20, "g": 4, "h": 12}


def serve(policy):
    """Serve the eight requests with the engine's scheduler: a list of the names computed in each step."""
    scheduler = scheduler_for(policy, max_num_seqs=SEATS, max_model_len=64)
    for name, count in num_output_tokens.items():
        submit(scheduler, name, num_prompt_tokens=8, num_output_tokens=count)
    steps = []
    while scheduler.has_unfinished:
        steps.append([s.request_id for s in one_step(scheduler).scheduled])
    return steps


def draw(title, steps):
    """A row a seat, a column a step; an empty cell is a seat for which nothing was computed."""
    seats = {f"seat {number}": [None] * len(steps) for number in range(SEATS)}
    taken = {}  # name: seat
    for number, names in enumerate(steps):
        for name in [name for name in taken if name not in names]:
            del taken[name]
        for name in names:
            if name not in taken:
                taken[name] = min(set(range(SEATS)) - set(taken.values()))
            seats[f"seat {taken[name]}"][number] = ("abcdefgh".index(name), name)
    used = sum(map(len, steps)) / (SEATS * len(steps))
    show(draw_grid(title, seats, note=f"{len(steps)} steps, {used:.1%} of the cells used"), title)
    return used

# %% [markdown] en
# ## The naive version
#
# Take four requests, compute until the last of them is done, take the next four. That is **static batching**, and it
# was how models were served until 2022. Eight requests, which generate between 4 and 24 tokens:
# %% [markdown] tr
# ## İlk akla gelen çözüm
#
# Dört istek alın, sonuncusu bitene dek hesaplayın, sonraki dördü alın. Buna **statik yığınlama** (static batching)
# denir; modeller 2022'ye dek böyle sunuldu. 4 ile 24 arasında token üreten sekiz istek:

# %%
static = serve("static")
used = draw("Static batching", static)
print(len(static), "steps,", f"{used:.1%} of the seats used")
assert len(static) == 44 and f"{used:.1%}" == "48.3%"

# %% [markdown] en
# ## What hurts
#
# The empty cells are the **bubble**: seats that are free and that nobody may take. Request `a` was done after 4
# steps; its seat stays empty for 20, because `b` is long. Only 48.3% of the cells hold a token, and `e` waits 24
# steps although a seat was free after 4.
#
# ## The new version
#
# Decide anew in every step. Whoever is done leaves, and whoever waits takes the seat in the very next step. That is
# **continuous batching** (Orca, 2022), and it is what `Engine.step()` does:
# %% [markdown] tr
# ## Sorun nerede?
#
# Boş hücreler **kabarcıktır** (bubble): boş olan ama kimsenin oturamadığı yerler. `a` isteği 4 adımda bitti; `b` uzun
# sürdüğü için yeri 20 adım boş kaldı. Hücrelerin yalnızca %48,3'ünde token var; `e` ise 4 adım sonra yer boşaldığı
# hâlde 24 adım bekliyor.
#
# ## Yeni çözüm
#
# Kararı her adımda yeniden verin. Biten çıkar, bekleyen hemen bir sonraki adımda onun yerine oturur. Buna **sürekli
# yığınlama** (continuous batching; Orca, 2022) denir; `Engine.step()` de bunu yapar:

# %%
continuous = serve("fcfs")
used = draw("Continuous batching", continuous)
print(len(continuous), "steps,", f"{used:.1%} of the seats used")
assert len(continuous) == 26 and f"{used:.1%}" == "81.7%"
assert continuous[4] == ["b", "c", "d", "e"]  # a is done, e takes its seat

# %% [markdown] en
# 26 steps instead of 44 for the same tokens. What is still empty lies at the end, where nobody waits any more; a busy
# server never gets there.
#
# ## Exercise
#
# Count the steps of both ways.
# %% [markdown] tr
# Aynı tokenlar için 44 yerine 26 adım. Hâlâ boş olan hücreler sonda, artık kimsenin beklemediği yerde; yoğun bir
# sunucu oraya hiç varmaz.
#
# ## Alıştırma
#
# İki yöntemin adımlarını sayın.

# %% [exercise] count_steps
def count_steps(lengths, num_seats):
    """Steps until all requests are done, for static and for continuous batching (roughly 8 lines).

    Args:
        lengths: list of ints, the tokens that each request generates, one a step, in the order of arrival.
        num_seats: sequences that a step computes at most.

    Returns:
        (static, continuous): ints. Static: batches of num_seats, in order. Continuous: the request next in order takes
        the first seat that gets free, in the step after the one that freed it.
    """
    raise NotImplementedError

# %% [solution] count_steps
def count_steps(lengths, num_seats):
    static = sum(max(lengths[i : i + num_seats]) for i in range(0, len(lengths), num_seats))
    free_after = [0] * num_seats  # the step after which each seat is free
    for length in lengths:
        seat = free_after.index(min(free_after))
        free_after[seat] += length
    return static, max(free_after)

# %% [check] count_steps
from tutorials.course import check


def steps_of_engine(policy, lengths, num_seats):
    scheduler = scheduler_for(policy, max_num_seqs=num_seats, max_model_len=64)
    for number, length in enumerate(lengths):
        submit(scheduler, str(number), 1, length)
    num_steps = 0
    while scheduler.has_unfinished:
        one_step(scheduler)
        num_steps += 1
    return num_steps


def examine_count_steps(count_steps):
    for lengths, num_seats in ([3], 2), ([2, 9, 2, 9], 2), ([9, 1, 1, 1, 8, 2], 3), ([4, 24, 6, 10, 5, 20, 4, 12], 4):
        found = count_steps(list(lengths), num_seats)
        for name, policy, steps in zip(("static", "continuous"), ("static", "fcfs"), found, strict=True):
            expected = steps_of_engine(policy, lengths, num_seats)
            assert steps == expected, f"lengths {lengths}, {num_seats} seats: {name} is {steps}; the engine takes {expected}."


check("count_steps", examine_count_steps, count_steps)

# %% [wrong] count_steps: lengths \[2, 9, 2, 9\], 2 seats: static is 11; the engine takes 18
def count_steps(lengths, num_seats, solution=count_steps):
    ordered = sorted(lengths)  # a batch cannot choose who arrives together
    static = sum(max(ordered[i : i + num_seats]) for i in range(0, len(lengths), num_seats))
    return static, solution(lengths, num_seats)[1]

# %% [wrong] count_steps: lengths \[3\], 2 seats: continuous is 2; the engine takes 3
def count_steps(lengths, num_seats):
    static = sum(max(lengths[i : i + num_seats]) for i in range(0, len(lengths), num_seats))
    return static, -(-sum(lengths) // num_seats)  # as if one request could sit on two seats

# %% [wrong] count_steps: lengths \[2, 9, 2, 9\], 2 seats: continuous is 18; the engine takes 13
def count_steps(lengths, num_seats):
    static = sum(max(lengths[i : i + num_seats]) for i in range(0, len(lengths), num_seats))
    free_after = [0] * num_seats
    for number, length in enumerate(lengths):
        free_after[number % num_seats] += length  # seats in turn, whether free or not
    return static, max(free_after)

# %% [markdown] en
# ## In the engine
#
# The same with the model, and the engine's own picture of it: one row a request, one column a step. The tokens are
# the same under both policies; only the number of steps differs.
# %% [markdown] tr
# ## Motorda
#
# Aynısı bu kez modelle; resmi de motorun kendisi çiziyor: her satır bir istek, her sütun bir adım. İki yöntemde de
# tokenlar aynıdır, yalnızca adım sayısı değişir.

# %%
from minipaged import LLM, SamplingParams
from minipaged.view import draw_timeline


def generate(policy):
    options = {"max_num_seqs": SEATS, "max_model_len": 64, "num_blocks": 64, "enable_prefix_caching": False}
    with LLM("tiny", device="reference", policy=policy, **options) as llm:
        llm.start_trace()
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in num_output_tokens.values()]
        outputs = llm.generate([f"{name.upper()}:\nNow" for name in num_output_tokens], params)
        return llm.stop_trace(), [output.outputs[0].token_ids for output in outputs]


static_trace, static_tokens = generate("static")
trace, tokens = generate("fcfs")
show(draw_timeline(trace, "Continuous batching"), "eight requests, each begins when another ends")
print("same tokens:", tokens == static_tokens, " steps:", len(static_trace), "and", len(trace))
assert tokens == static_tokens and len(trace) == 26 and len(static_trace) == 44

# %% [markdown] en
# ## What to read next
#
# - [`scheduler.py`](../../minipaged/core/scheduler.py): `schedule()` decides a step; read its docstring first.
# - [`static_scheduler.py`](../../minipaged/core/static_scheduler.py): the baseline differs in four short methods.
# - `minipaged bench throughput --compare static` measures what this is worth in tokens a second.
# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`scheduler.py`](../../minipaged/core/scheduler.py): bir adımın kararını `schedule()` verir; önce docstring'ini
#   okuyun.
# - [`static_scheduler.py`](../../minipaged/core/static_scheduler.py): karşılaştırılan yöntem yalnızca dört kısa
#   metotla ayrılır.
# - `minipaged bench throughput --compare static`, bunun saniyede kaç token kazandırdığını ölçer.
