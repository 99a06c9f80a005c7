# %% [markdown] en
# # 05 · A whole Llama forward pass
#
# **Goal.** Put the pieces together: from token ids to the **logits** of the next token, through all layers of a real
# model. "Right" means here: equal to what another implementation, Hugging Face transformers, computes from the same
# weights. About 15 minutes.
#
# A Llama model is a **residual stream**: a vector per token, to which every layer adds something twice.
#
# ```
# x = embedding[token_ids]                      one row a token
# for each layer:
#     x = x + attention(rms_norm(x))            tokens look at each other
#     x = x + feed_forward(rms_norm(x))         each token for itself
# logits = rms_norm(x) @ lm_head.T              a score for each token of the vocabulary
# ```
# %% [markdown] tr
# # 05 · Baştan sona bir Llama ileri geçişi
#
# **Amaç.** Parçaları birleştirmek: token kimliklerinden, gerçek bir modelin bütün katmanlarından geçerek sıradaki
# tokenın **logitlerine** (logits) varmak. "Doğru" burada şu demek: başka bir gerçekleştirimin, Hugging Face
# transformers'ın aynı ağırlıklardan hesapladığına eşit. Yaklaşık 15 dakika.
#
# Bir Llama modeli bir **artık akıştır** (residual stream): token başına bir vektör vardır, her katman buna iki kez
# bir şey ekler.
#
# ```
# x = embedding[token_ids]                      one row a token
# for each layer:
#     x = x + attention(rms_norm(x))            tokens look at each other
#     x = x + feed_forward(rms_norm(x))         each token for itself
# logits = rms_norm(x) @ lm_head.T              a score for each token of the vocabulary
# ```

# %%
import numpy as np

from minipaged.model.architectures import load_weights
from minipaged.model.loader import load_model
from minipaged.ops.reference import ReferenceOps
from tutorials.course import golden, show
from tutorials.course.drawing import draw_grid
from tutorials.course.step05 import attention, next_words_by_layer

model, ops = load_model("tiny"), ReferenceOps()
config, weights = model.config, load_weights(model.config, model.source)
example = golden()[2]
print(repr(example["prompt"]))
print(len(example["prompt_ids"]), "tokens; the layers have", config.hidden_size, "values a token")
for top in example["target"]["top5_last_prompt_position"]:
    print(f"computed elsewhere: {top['token']:5} {top['logit']:.2f}")
assert len(example["prompt_ids"]) == 31 and config.num_layers == 4

# %% [markdown] en
# Since everything is added up in one stream, we can stop after any layer and ask the head what it would say by then.
# Watch the model make up its mind about a character's name (green: what it says in the end):
# %% [markdown] tr
# Her şey tek bir akışta toplandığı için istediğimiz katmandan sonra durup çıkış başına (lm_head), o ana kadarki akışa
# bakarak ne diyeceğini sorabiliriz. Modelin bir karakterin adına nasıl karar verdiğini izleyin (yeşil: en sonunda
# söylediği):

# %%
text = "KING RICHARD III:\nNow is the winter of our discontent"
words, by_layer = next_words_by_layer(model, weights, text)
last = by_layer["after layer 4"]
rows = {"input": [(7, word) for word in words]}
for name, row in by_layer.items():
    rows[name] = [(2 if word == end else 0, word) for word, end in zip(row, last, strict=True)]
show(draw_grid("The likeliest next token", rows, cell=52), "a row a layer")
assert len(words) == len(last) and len(by_layer) == 5

# %% [markdown] en
# ## The feed-forward part
#
# Attention is step 04. The other half of a layer is **SwiGLU**: two projections up, one of which passes through
# *silu* and gates the other, and one projection down:
#
# $$y = W_\text{down} \left( \text{silu}(W_\text{gate} x) \odot W_\text{up} x \right) \qquad \text{silu}(a) = \frac{a}{1 + e^{-a}}$$
# %% [markdown] tr
# ## İleri besleme parçası
#
# Dikkat 04. adımda yazıldı. Katmanın öbür yarısı **SwiGLU**'dur: yukarı iki izdüşüm yapılır; bunların biri *silu*'dan
# geçip öbürünü kapılar (gate), sonra aşağı tek bir izdüşüm gelir:
#
# $$y = W_\text{down} \left( \text{silu}(W_\text{gate} x) \odot W_\text{up} x \right) \qquad \text{silu}(a) = \frac{a}{1 + e^{-a}}$$

# %% [exercise] feed_forward
def feed_forward(x, gate, up, down):
    """SwiGLU (roughly 3 lines).

    Args:
        x: float32 array [T, H].
        gate, up: float32 arrays [I, H].
        down: float32 array [H, I].

    Returns:
        float32 array [T, H]. Weights are stored [out, in]: a product is `x @ weight.T`.
    """
    raise NotImplementedError

# %% [solution] feed_forward
def feed_forward(x, gate, up, down):
    a = x @ gate.T
    return (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T

# %% [check] feed_forward
from tutorials.course import check
from tutorials.course.step05 import examine_feed_forward, examine_forward

check("feed_forward", examine_feed_forward, feed_forward)

# %% [wrong] feed_forward: up, not gate, passed through silu
def feed_forward(x, gate, up, down):
    a = x @ up.T
    return (a / (1 + np.exp(-a)) * (x @ gate.T)) @ down.T

# %% [wrong] feed_forward: sigmoid
def feed_forward(x, gate, up, down):
    return (1 / (1 + np.exp(-(x @ gate.T))) * (x @ up.T)) @ down.T

# %% [wrong] feed_forward: matmul
def feed_forward(x, gate, up, down):
    a = x @ gate  # not transposed
    return (a / (1 + np.exp(-a)) * (x @ up)) @ down

# %% [markdown] en
# ## The whole
#
# `layer.gate_up.weight` holds the rows of the gate and then those of up, in one matrix, because one large product is
# faster than two small ones. `ops.gated_activation` knows that. Here are the pieces for the next exercise; they are
# the engine's, so yours need not be ready:
#
# - `attention(config, layer, x)`: step 04 between its projections, `[T, H]` to `[T, H]`;
# - `engine_feed_forward(layer, x)`, below, `[T, H]` to `[T, H]`;
# - `ops.rms_norm(x, weight, eps)` divides each row by the root of its mean square.
# %% [markdown] tr
# ## Bütünü
#
# `layer.gate_up.weight`, kapının satırlarını ve ardından yukarı izdüşümün satırlarını tek bir matriste tutar; çünkü
# büyük tek bir çarpım küçük iki çarpımdan hızlıdır. `ops.gated_activation` bunu bilir. Sıradaki alıştırmanın
# parçaları şunlar; hepsi motorundur, yani sizinkilerin hazır olması gerekmez:
#
# - `attention(config, layer, x)`: izdüşümleri arasında 04. adım, `[T, H]` alır, `[T, H]` verir;
# - aşağıdaki `engine_feed_forward(layer, x)`: `[T, H]` alır, `[T, H]` verir;
# - `ops.rms_norm(x, weight, eps)`: her satırı, karelerinin ortalamasının köküne böler.

# %%
def engine_feed_forward(layer, x):
    return ops.linear(ops.gated_activation("silu", ops.linear(x, layer.gate_up.weight)), layer.down.weight)


layer = weights.layers[0]
print("gate_up", layer.gate_up.weight.shape, "down", layer.down.weight.shape, "embedding", weights.embedding.shape)
assert layer.gate_up.weight.shape == (2 * 512, 192) and weights.lm_head is weights.embedding

# %% [exercise] forward
def forward(config, weights, token_ids):
    """Logits of the token that follows `token_ids` (roughly 7 lines).

    Args:
        config: has norm_eps.
        weights: has embedding [V, H], layers, final_norm.weight [H] and lm_head [V, H]. A layer has input_norm.weight,
            which comes before attention, and mlp_norm.weight, which comes before the feed-forward part.
        token_ids: list of T ints.

    Returns:
        float32 array [V], for the last position only.
    """
    raise NotImplementedError

# %% [solution] forward
def forward(config, weights, token_ids):
    x = weights.embedding[np.array(token_ids)]
    for layer in weights.layers:
        x = x + attention(config, layer, ops.rms_norm(x, layer.input_norm.weight, config.norm_eps))
        x = x + engine_feed_forward(layer, ops.rms_norm(x, layer.mlp_norm.weight, config.norm_eps))
    last = ops.rms_norm(x[-1:], weights.final_norm.weight, config.norm_eps)
    return (last @ weights.lm_head.T)[0]

# %% [check] forward
check("forward", examine_forward, forward)

# %% [wrong] forward: 'To' .* 9\.01
def forward(config, weights, token_ids):
    x = weights.embedding[np.array(token_ids)]
    for layer in weights.layers:  # nothing is added: the residual is missing
        x = attention(config, layer, ops.rms_norm(x, layer.input_norm.weight, config.norm_eps))
        x = engine_feed_forward(layer, ops.rms_norm(x, layer.mlp_norm.weight, config.norm_eps))
    return (ops.rms_norm(x[-1:], weights.final_norm.weight, config.norm_eps) @ weights.lm_head.T)[0]

# %% [wrong] forward: 'To' .* 9\.01
def forward(config, weights, token_ids):
    x = weights.embedding[np.array(token_ids)]
    for layer in weights.layers:
        normed = ops.rms_norm(x, layer.input_norm.weight, config.norm_eps)
        x = x + attention(config, layer, normed) + engine_feed_forward(layer, normed)  # both from the same input
    return (ops.rms_norm(x[-1:], weights.final_norm.weight, config.norm_eps) @ weights.lm_head.T)[0]

# %% [wrong] forward: shape is \(28, 1024\)
def forward(config, weights, token_ids):
    x = weights.embedding[np.array(token_ids)]
    for layer in weights.layers:
        x = x + attention(config, layer, ops.rms_norm(x, layer.input_norm.weight, config.norm_eps))
        x = x + engine_feed_forward(layer, ops.rms_norm(x, layer.mlp_norm.weight, config.norm_eps))
    return ops.rms_norm(x, weights.final_norm.weight, config.norm_eps) @ weights.lm_head.T  # of all positions

# %% [wrong] forward: 'To' .* 9\.01
def forward(config, weights, token_ids):
    x = weights.embedding[np.array(token_ids)]
    for layer in weights.layers:
        x = x + attention(config, layer, ops.rms_norm(x, layer.input_norm.weight, config.norm_eps))
        x = x + engine_feed_forward(layer, ops.rms_norm(x, layer.mlp_norm.weight, config.norm_eps))
    return (x[-1:] @ weights.lm_head.T)[0]  # no norm before the head

# %% [markdown] en
# ## Generate, the naive way
#
# Take the likeliest token, append it, and run the forward pass over everything again:
# %% [markdown] tr
# ## Üretmek: ilk akla gelen yol
#
# En olası tokenı alın, sona ekleyin, ileri geçişi her şeyin üzerinden yeniden yürütün:

# %%
from minipaged import LLM, SamplingParams
from tutorials.course.step05 import engine_forward

token_ids, num_computed = list(example["prompt_ids"]), 0
for _ in range(16):
    logits = engine_forward(config, weights, token_ids)
    num_computed += len(token_ids)
    token_ids.append(int(logits.argmax()))
generated = token_ids[31:]
print(repr(model.tokenizer.decode(generated)))
print("token positions computed:", num_computed)
assert generated == example["target"]["greedy_ids"][:16] and num_computed == 616

# %% [markdown] en
# All 16 tokens are those that transformers generates. But 616 positions were computed to get them: nearly all of them
# again and again, although the keys and values of a token never change once they are there.
#
# ## The new version
#
# With the KV cache each token is computed once: 31 of the prompt, and then one after the other those generated,
# except for the last, which nobody needs to feed back. The engine does that:
# %% [markdown] tr
# 16 tokenın hepsi, transformers'ın ürettikleriyle aynı. Ama onlara ulaşmak için 616 konum hesaplandı: Neredeyse hepsi
# tekrar tekrar, oysa bir tokenın anahtarı ve değeri bir kez ortaya çıkınca artık değişmez.
#
# ## Yeni çözüm
#
# KV önbelleğiyle her token bir kez hesaplanır: önce istemin 31 tokenı, sonra birer birer üretilenler; sonuncusunu
# geri beslemek gerekmez. Motor bunu yapar:

# %%
with LLM("tiny", device="reference", enable_prefix_caching=False) as llm:
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    (output,) = llm.generate(example["prompt_ids"], params)
    stats = llm.stats()
num_computed = stats.num_prompt_tokens_computed + stats.num_generated_tokens - 1
print("same tokens:", output.outputs[0].token_ids == generated, " token positions computed:", num_computed)
assert output.outputs[0].token_ids == generated and num_computed == 46

# %% [markdown] en
# 46 positions instead of 616, the same tokens.
#
# ## What to read next
#
# - [`decoder.py`](../../minipaged/model/decoder.py): the forward pass of all supported models; yours is in
#   `_hidden`.
# - [`architectures.py`](../../minipaged/model/architectures.py): how a `config.json` becomes a `ModelConfig`.
# - [`test_golden.py`](../../tests/engine/test_golden.py): the engine against the same golden values.
# %% [markdown] tr
# 616 yerine 46 konum, aynı tokenlar.
#
# ## Sırada ne okumalı?
#
# - [`decoder.py`](../../minipaged/model/decoder.py): desteklenen bütün modellerin ileri geçişi; sizinki `_hidden`
#   içinde.
# - [`architectures.py`](../../minipaged/model/architectures.py): bir `config.json` nasıl `ModelConfig` olur?
# - [`test_golden.py`](../../tests/engine/test_golden.py): motor, aynı altın değerler (golden values) karşısında.
