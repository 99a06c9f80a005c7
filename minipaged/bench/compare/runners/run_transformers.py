"""Hugging Face transformers on PyTorch: a padded batch, as ``generate`` does it; it has no paging."""

import time

from serve import serve, take_options


class Runner:
    def __init__(self, model, limits, options):
        import torch
        import transformers

        options = take_options(options, {"dtype": "float32"})
        torch.set_num_threads(limits["num_threads"])
        torch.set_grad_enabled(False)
        self.torch, self.version = torch, transformers.__version__
        dtype = getattr(torch, options["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def about(self):
        version = f"{self.version}, torch {self.torch.__version__}"
        return {"version": version, "vocab_size": self.model.config.get_text_config().vocab_size}

    def run(self, requests):
        """Prompts are padded on the left; a sequence that has all its tokens leaves the batch only
        with the others (``generate`` has no other way), but its further tokens are not counted."""
        torch = self.torch
        longest = max(len(r["prompt"]) for r in requests)
        steps = max(r["max_tokens"] for r in requests)
        started = time.perf_counter()
        ids = torch.tensor([[0] * (longest - len(r["prompt"])) + r["prompt"] for r in requests])
        mask = torch.tensor([[0] * (longest - len(r["prompt"])) + [1] * len(r["prompt"]) for r in requests])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, first = None, None
        for _ in range(steps):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
            first = first or time.perf_counter() - started
        return time.perf_counter() - started, first, sum(r["max_tokens"] for r in requests)


if __name__ == "__main__":
    serve(Runner)
