// libminipaged from Node, through koffi (npm install koffi). Usage: node hello.mjs MODEL
//
// minipaged_wait would block Node's only thread; koffi's .async runs a call on a worker thread instead, and the
// event loop goes on. Several requests are submitted first, so they are computed together.
import { execFileSync } from "node:child_process";
import koffi from "koffi";

const model = process.argv[2];
if (!model) {
  console.error("usage: node hello.mjs MODEL");
  process.exit(2);
}
const path = process.env.MINIPAGED_LIBRARY ?? execFileSync("minipaged", ["config", "--library"], { encoding: "utf8" }).trim();
const lib = koffi.load(path);

// The fields that are used, in the order of the header: a struct may end where a field begins, and what is
// behind it takes defaults.
const UNSET = -2147483648;
const Sampling = koffi.struct("minipaged_sampling", {
  struct_size: "uint32_t",
  n: "int32_t",
  max_tokens: "int64_t",
  min_tokens: "int64_t",
  temperature: "double",
});
koffi.opaque("minipaged_engine");
const create = lib.func("int32_t minipaged_engine_create(_Out_ minipaged_engine **engine, const char *model, void *options)");
const destroy = lib.func("int32_t minipaged_engine_destroy(minipaged_engine *engine)");
const submit = lib.func(
  "int32_t minipaged_submit_text(_Out_ uint64_t *request, minipaged_engine *engine, const char *text, size_t length, minipaged_sampling *sampling, void *options)",
);
const wait = lib.func("int32_t minipaged_wait(minipaged_engine *engine, uint64_t request, int64_t timeout_ms)");
const requestText = lib.func(
  "int32_t minipaged_request_text(minipaged_engine *engine, uint64_t request, int32_t choice, _Out_ uint8_t *buffer, size_t capacity, _Out_ size_t *length)",
);
const free = lib.func("int32_t minipaged_request_free(minipaged_engine *engine, uint64_t request)");
const lastError = lib.func("const char *minipaged_error()");
const statusName = lib.func("const char *minipaged_status_name(int32_t status)");

function check(status) {
  if (status < 0) throw new Error(`${statusName(status)}: ${lastError()}`);
  return status;
}

function text(engine, request) {
  const length = [0];
  check(requestText(engine, request, 0, null, 0, length));
  const buffer = Buffer.alloc(Number(length[0]) + 1);
  check(requestText(engine, request, 0, buffer, buffer.length, length));
  return buffer.toString("utf8", 0, Number(length[0]));
}

const handle = [null];
check(create(handle, model, null));
const engine = handle[0];
try {
  const prompts = ["Where is the king?", "Good morrow, my lord.", "What news from the court?"];
  const sampling = { struct_size: koffi.sizeof(Sampling), n: UNSET, max_tokens: 32, min_tokens: UNSET, temperature: 0 };
  const requests = prompts.map((prompt) => {
    const id = [0];
    check(submit(id, engine, prompt, Buffer.byteLength(prompt), sampling, null));
    return id[0];
  });
  for (const [i, request] of requests.entries()) {
    // The error text belongs to the worker thread, so the status is what is known of a failure here.
    const status = await new Promise((resolve, reject) =>
      wait.async(engine, request, -1, (error, result) => (error ? reject(error) : resolve(result))),
    );
    if (status < 0) throw new Error(statusName(status));
    console.log(prompts[i] + text(engine, request) + "\n---");
    check(free(engine, request));
  }
} catch (error) {
  console.error(`hello: ${error.message}`);
  process.exitCode = 1;
} finally {
  check(destroy(engine));
}
