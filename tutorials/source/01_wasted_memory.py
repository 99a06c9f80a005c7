# %% [markdown] en
# # 01 · Why KV memory is wasted
#
# **Goal.** Know what the KV cache of a language model costs, and measure how much of it holds nothing at all when every
# sequence reserves its memory in one piece. Then measure the same with blocks. About 10 minutes.
#
# A language model generates one token at a time. For each token it has seen, every layer keeps a **key** and a
# **value** vector, because all later tokens will attend to them. This store is the **KV cache**. It grows by one
# entry per token and per layer, and nobody knows in advance how long a text will become.
# %% [markdown] tr
# # 01 · KV belleği neden boşa gider?
#
# **Amaç.** Bir dil modelinin KV önbelleğinin kaça mal olduğunu öğrenmek; her dizi belleğini tek parça hâlinde
# ayırttığında bunun ne kadarının bomboş kaldığını ölçmek, sonra aynı ölçümü bloklarla yinelemek. Yaklaşık 10 dakika.
#
# Dil modeli her seferinde bir token üretir. Gördüğü her token için her katman bir **anahtar** (key) ve bir **değer**
# (value) vektörü saklar; çünkü sonraki tokenların hepsi bunlara bakacaktır. Bu depoya **KV önbelleği** (KV cache)
# denir.
# Depo, her tokenla birlikte her katmanda bir kayıt uzar; üstelik bir metnin ne kadar uzayacağını kimse önceden
# bilmez.

# %%
from minipaged.model.loader import load_model

config = load_model("tiny").config
values_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # K and V
bytes_per_token = 4 * values_per_token  # float32
print(config.num_layers, "layers,", config.num_kv_heads, "KV heads of", config.head_dim, "values")
print("bytes per token:", bytes_per_token)
assert bytes_per_token == 2048

llama_3_8b = 2 * 32 * 8 * 128 * 2  # 32 layers, 8 KV heads of 128 values, 2 bytes each
print("Llama 3 8B, bytes per token:", llama_3_8b, " GiB for 8192 tokens:", llama_3_8b * 8192 / 2**30)
assert llama_3_8b * 8192 == 2**30

# %% [markdown] en
# `tiny`, the model of this course, needs 2 KiB per token. A model of 8 billion parameters needs a whole GiB for one
# sequence of 8192 tokens. KV memory, not the weights, decides how many users fit on a machine.
#
# ## The naive version
#
# The obvious way is one array per sequence, `[max_model_len, ...]`, reserved when the request arrives: the sequence
# might become that long. Our engine still has this scheduler as a baseline, under the name `"static"`. Let three
# requests run on 64 blocks of 16 tokens. Each may become 256 tokens long, so each reserves 16 blocks; look at how
# much of them is filled:
# %% [markdown] tr
# Bu kursun modeli `tiny`, token başına 2 KiB ister. Sekiz milyar parametreli bir model ise 8192 tokenlık tek bir dizi
# için koca bir GiB ister. Bir makineye kaç kullanıcının sığacağını ağırlıklar değil, KV belleği belirler.
#
# ## İlk akla gelen çözüm
#
# İlk akla gelen, her dizi için istek geldiğinde `[max_model_len, ...]` boyutunda bir NumPy dizisi ayırmaktır; sonuçta
# metin o kadar uzayabilir. Motorumuz böyle çalışan bir zamanlayıcıyı (scheduler), karşılaştırma yapılabilsin diye
# `"static"` adıyla hâlâ barındırır. 16 tokenlık 64 blok üzerinde üç istek çalıştıralım. Her biri 256 tokena kadar
# uzayabileceği için her biri 16 blok ayırtır. Bunların ne kadarı dolu, bakın:

# %%
from minipaged.view import draw_blocks
from tutorials.course import show
from tutorials.course.simulation import one_step, scheduler_for, submit

requests = {"question": (20, 40), "summary": (100, 30), "chat": (45, 60)}  # prompt tokens, output tokens


def after_20_steps(policy):
    scheduler = scheduler_for(policy, num_blocks=64, block_size=16, max_model_len=256)
    for name, (num_prompt_tokens, num_output_tokens) in requests.items():
        submit(scheduler, name, num_prompt_tokens, num_output_tokens)
    for _ in range(20):
        one_step(scheduler)
    return scheduler


contiguous = after_20_steps("static")
show(draw_blocks(contiguous, "Reserved in one piece"), "three block tables of 16 blocks; few slots hold KV")

# %% [markdown] en
# ## What hurts
#
# The bar in each cell says how many of the block's slots hold the KV of a token. Most cells have no bar at all. That
# memory is reserved, and no other request may use it. Counted:
# %% [markdown] tr
# ## Sorun nerede?
#
# Her hücredeki çubuk, bloğun kaç yuvasında (slot) bir tokenın KV'si olduğunu gösterir. Hücrelerin çoğunda çubuk yok.
# Bu bellek ayrılmıştır, başka hiçbir istek onu kullanamaz. Sayalım:

# %%
def waste(scheduler):
    reserved = sum(request.block_table.capacity for request in scheduler.running)  # slots
    held = sum(request.num_computed_tokens for request in scheduler.running)
    return 1 - held / reserved, held, reserved


wasted, held, reserved = waste(contiguous)
print(f"{held} of {reserved} slots hold a token; {wasted:.1%} wasted")
assert (held, reserved) == (222, 768) and f"{wasted:.1%}" == "71.1%"

# %% [markdown] en
# 71.1% of the reserved memory is empty. Some of it will be filled later; most never will, because few texts become as
# long as they might.
#
# ## The new version
#
# Paging, an old idea of operating systems: cut the memory into blocks, and give a sequence the next block only when
# it needs one. The last block of a sequence is partly empty, and that is all that is ever wasted. The same three
# requests:
# %% [markdown] tr
# Ayrılan belleğin %71,1'i boş. Bir kısmı ileride dolacak, çoğu ise hiç dolmayacak; çünkü olabileceği kadar uzayan metin
# azdır.
#
# ## Yeni çözüm
#
# Sayfalama (paging), işletim sistemlerinin eski bir buluşu: Belleği bloklara bölün, diziye sıradaki bloğu ancak
# gerektiğinde verin. Dizinin yalnızca son bloğunun bir kısmı boş kalır, bütün israf bundan ibarettir. Aynı üç istek:

# %%
paged = after_20_steps("fcfs")
show(draw_blocks(paged, "Blocks on demand"), "three block tables of 3 to 8 blocks, nearly all slots hold KV")
wasted, held, reserved = waste(paged)
print(f"{held} of {reserved} slots hold a token; {wasted:.1%} wasted")
assert (held, reserved) == (222, 240) and f"{wasted:.1%}" == "7.5%"

# %% [markdown] en
# 7.5%, and 49 blocks are left for other requests. With longer texts it is less. The engine's benchmark replays requests
# whose lengths are distributed as in real conversations, through both schedulers:
# %% [markdown] tr
# Yalnızca %7,5; üstelik başka istekler için 49 blok artıyor. Metinler uzadıkça oran daha da düşer. Motorun ölçüm
# programı, uzunlukları gerçek sohbetlerdeki gibi dağılan istekleri iki zamanlayıcıdan da geçirir:

# %%
from minipaged.bench.memory import measure

assert paged.pool.num_free == 49
result = measure(distribution="conversation", num_requests=64, seed=0)
for name in ("contiguous", "paged"):
    print(f"{name:>10}: waste {result[name]['waste']:.1%}, sequences at once {result[name]['peak_running']}")
assert f"{result['contiguous']['waste']:.1%} {result['paged']['waste']:.1%}" == "77.1% 1.6%"
assert (result["contiguous"]["peak_running"], result["paged"]["peak_running"]) == (16, 64)

# %% [markdown] en
# 77.1% against 1.6%. In the same memory 64 sequences run at once instead of 16.
#
# ## Exercise
#
# Write the count of empty slots for both ways, for sequences of given lengths.
# %% [markdown] tr
# %77,1'e karşı %1,6. Aynı bellekte aynı anda 16 yerine 64 dizi çalışıyor.
#
# ## Alıştırma
#
# Uzunlukları verilen diziler için, iki yöntemde boş kalan yuvaların sayısını hesaplayın.

# %% [exercise] empty_slots
def empty_slots(lengths, block_size, max_model_len):
    """Slots that are reserved and hold no token (roughly 3 lines).

    Args:
        lengths: list of ints, the tokens that each sequence holds now; each at least 1.
        block_size: slots of a block.
        max_model_len: slots that a contiguous reservation takes.

    Returns:
        (contiguous, paged): ints. Paged sequences hold as few blocks as their tokens need.
    """
    raise NotImplementedError

# %% [solution] empty_slots
def empty_slots(lengths, block_size, max_model_len):
    contiguous = sum(max_model_len - n for n in lengths)
    paged = sum(-n % block_size for n in lengths)  # what is missing to the next multiple
    return contiguous, paged

# %% [check] empty_slots
from tutorials.course import check


def examine_empty_slots(empty_slots):
    for lengths in ([16], [1], [17], [39, 119, 64]):
        held, blocks = sum(lengths), sum(-(-n // 16) for n in lengths)
        contiguous, paged = empty_slots(lengths, block_size=16, max_model_len=256)
        expected = 256 * len(lengths) - held
        assert contiguous == expected, f"lengths {lengths}: contiguous is {contiguous}; it must be {expected}."
        expected = 16 * blocks - held
        assert paged == expected, f"lengths {lengths}: paged is {paged}; {blocks} blocks of 16 leave {expected} empty."


check("empty_slots", examine_empty_slots, empty_slots)

# %% [wrong] empty_slots: lengths \[16\]: paged is 16; 1 blocks of 16 leave 0 empty
def empty_slots(lengths, block_size, max_model_len):
    contiguous = sum(max_model_len - n for n in lengths)
    return contiguous, sum(block_size - n % block_size for n in lengths)  # a full block is not an empty one

# %% [wrong] empty_slots: paged is 1; 1 blocks of 16 leave 15 empty
def empty_slots(lengths, block_size, max_model_len):
    return sum(max_model_len - n for n in lengths), sum(n % block_size for n in lengths)  # the filled part

# %% [wrong] empty_slots: lengths \[39, 119, 64\]: contiguous is 34; it must be 546
def empty_slots(lengths, block_size, max_model_len):
    return max_model_len - sum(lengths), sum(-n % block_size for n in lengths)  # one region for all

# %% [markdown] en
# ## What to read next
#
# - [`static_scheduler.py`](../../minipaged/core/static_scheduler.py): contiguous reservation, the baseline.
# - [`memory.py`](../../minipaged/bench/memory.py): the measurement above; `minipaged bench memory` prints it.
# - "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023), figure 2.
#
# In step 02 you write the allocator that hands out these blocks.
# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`static_scheduler.py`](../../minipaged/core/static_scheduler.py): karşılaştırma için kalan tek parça ayırma.
# - [`memory.py`](../../minipaged/bench/memory.py): yukarıdaki ölçüm; `minipaged bench memory` komutu onu yazdırır.
# - "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon ve ark., 2023), şekil 2.
#
# 02. adımda bu blokları dağıtan ayırıcıyı siz yazacaksınız.
