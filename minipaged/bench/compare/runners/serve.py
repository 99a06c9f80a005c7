"""The protocol of a runner: JSON lines on stdin and stdout, standard library only.

    {"op": "load", "model": "...", "limits": {...}, "options": {...}}  ->  {"ok": {"version": "...", ...}}
    {"op": "run", "requests": [{"prompt": [ids], "max_tokens": n}, ...]}
        ->  {"ok": {"wall": s, "first": s, "generated": n}}
    {"op": "memory"}  ->  {"ok": {"peak_rss": bytes or null}}

All requests of a run arrive at once, are greedy and ignore end-of-sequence. ``wall`` is the time to
the last token of all, ``first`` to the first token of any; ``generated`` counts tokens. What goes wrong
is answered ``{"error": "..."}``. The end of stdin ends the runner.

``limits``: ``num_threads``, ``max_num_seqs`` (requests at once), ``max_model_len`` (tokens of one),
``kv_tokens`` (tokens of all requests of a run). ``options``: the engine's own, values are text.
"""

import json
import os
import sys
import traceback


class RunnerError(Exception):
    """Something that the user can put right; shown without a traceback."""


def serve(engine_class):
    """Answer until stdin ends. ``engine_class(model, limits, options)`` has ``about()``, a dict, and
    ``run(requests)``, which returns ``(wall, first, generated)``."""
    # Libraries print to stdout as they please: keep the real one for answers, and give them stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if message["op"] == "load":
                engine = engine_class(message["model"], message["limits"], message["options"])
                answer = engine.about()
            elif message["op"] == "run":
                wall, first, generated = engine.run(message["requests"])
                answer = {"wall": wall, "first": first, "generated": generated}
            else:
                answer = {"peak_rss": peak_rss()}
            reply = {"ok": answer}
        except (RunnerError, ImportError) as error:
            reply = {"error": str(error)}
        except Exception as error:  # whatever the engine raises is its answer
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    if hasattr(engine, "close"):
        engine.close()


def peak_rss(pid="self"):
    """Most bytes of memory that were resident in a process at one time; ``None``: not told here."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def take_options(options, known):
    """``options`` with the defaults of ``known``; refuses any other name."""
    for name in options:
        if name not in known:
            raise RunnerError(f"unknown option {name!r}; this engine takes {', '.join(known) or 'none'}")
    return known | options
