// llama.cpp by the npm package node-llama-cpp, which brings prebuilt CPU libraries; run by node.
//
// The protocol is that of serve.py. Options: `packages` (the node_modules folder that has node-llama-cpp,
// needed), `batch_size` (tokens of one llama.cpp batch) and `flash_attention` (true or false). The model is
// a GGUF file. llama.cpp gives every sequence cells of its own, so there is no prefix cache to switch off.

import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";
import { pathToFileURL } from "node:url";

class Runner {
  static async load({ model, limits, options }) {
    const { packages, batch_size = "512", flash_attention = "false", ...unknown } = options;
    for (const name in unknown)
      throw new Error(`unknown option '${name}'; this engine takes packages, batch_size, flash_attention`);
    const folder = path.resolve(packages ?? "node_modules", "node-llama-cpp");
    if (!fs.existsSync(folder))
      throw new Error(`${folder} does not exist; give packages=FOLDER, the node_modules that has node-llama-cpp`);
    const { getLlama } = await import(pathToFileURL(path.join(folder, "dist/index.js")));
    const runner = new Runner();
    const settings = { gpu: false, build: "never", skipDownload: true, logLevel: "error" };
    runner.llama = await getLlama({ ...settings, maxThreads: limits.num_threads });
    runner.model = await runner.llama.loadModel({ modelPath: model });
    runner.context = await runner.model.createContext({
      sequences: limits.max_num_seqs,
      contextSize: limits.max_model_len,
      batchSize: Number(batch_size),
      threads: limits.num_threads,
      flashAttention: flash_attention === "true",
    });
    const { version } = JSON.parse(fs.readFileSync(path.join(folder, "package.json")));
    runner.version = `llama.cpp ${runner.llama.llamaCppRelease.release}, node-llama-cpp ${version}`;
    return runner;
  }

  about() {
    return { version: this.version };
  }

  async run({ requests }) {
    const sequences = requests.map(() => this.context.getSequence());
    let first = null;
    let generated = 0;
    const started = performance.now();
    const seconds = () => (performance.now() - started) / 1e3;
    const serve = async ({ prompt, max_tokens: wanted }, sequence) => {
      for await (const _ of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
        first ??= seconds();
        generated += 1;
        wanted -= 1;
        if (wanted === 0) break;
      }
    };
    await Promise.all(requests.map((request, i) => serve(request, sequences[i])));
    const wall = seconds();
    for (const sequence of sequences) await sequence.dispose();
    return { wall, first, generated };
  }
}

function peakMemory() {
  const status = fs.existsSync("/proc/self/status") ? fs.readFileSync("/proc/self/status", "utf8") : "";
  const kilobytes = status.match(/^VmHWM:\s*(\d+)/m)?.[1];
  return { peak_rss: kilobytes ? Number(kilobytes) * 1024 : null };
}

let engine;
for await (const line of readline.createInterface({ input: process.stdin })) {
  let reply;
  try {
    const message = JSON.parse(line);
    if (message.op === "load") {
      engine = await Runner.load(message);
      reply = { ok: engine.about() };
    } else {
      reply = { ok: message.op === "run" ? await engine.run(message) : peakMemory() };
    }
  } catch (error) {
    reply = { error: error.message };
  }
  process.stdout.write(JSON.stringify(reply) + "\n");
}
process.exit(0);
