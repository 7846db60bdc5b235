// Programs and a browser for a test of the status page. All are on loopback, and all end with the test, also when it fails.

import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { chromium } from "playwright-core";

// Long enough for a busy machine.
const PATIENCE_MS = 30_000;
// No program outlives this, even if this process is killed.
const LIFE_SECONDS = 120;

const program = resolve(process.env.MILLPOND ?? "target/release/millpond");

/** Waits until `condition` returns something true, and returns that. */
export async function until(what, condition) {
  const end = Date.now() + PATIENCE_MS;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > end) throw new Error(`not within ${PATIENCE_MS / 1000} s: ${what}`);
    await new Promise((wake) => setTimeout(wake, 50));
  }
}

/** A program that runs until it ends by itself or is killed by its own process id. */
class Program {
  constructor(args) {
    // `timeout` forwards signals, and kills a program that does not end after them.
    this.process = spawn("timeout", ["--foreground", "--kill-after=60", String(LIFE_SECONDS), program, ...args], { stdio: ["ignore", "pipe", "pipe"] });
    this.output = "";
    this.process.stdout.on("data", (data) => { this.output += data; });
    this.process.stderr.on("data", (data) => { this.output += data; });
    this.ended = new Promise((end) => this.process.on("exit", (code) => end(code)));
  }

  async says(pattern) {
    const found = await until(`${pattern} in ${this.output}`, () => pattern.exec(this.output));
    return found[1];
  }

  signal(name) {
    this.process.kill(name);
  }

  async end() {
    if (this.process.exitCode === null && this.process.signalCode === null) {
      this.process.kill("SIGTERM");
      // A signal more than a second after the first abandons the drain.
      const again = setTimeout(() => this.process.kill("SIGTERM"), 1200);
      await this.ended;
      clearTimeout(again);
    }
  }
}

/** Everything one test starts. Give its `end` to the test's `after`. */
export class Stage {
  constructor() {
    this.programs = [];
    this.errors = [];
    this.requests = [];
    this.profile = mkdtempSync(join(tmpdir(), "millpond-page-"));
  }

  /** Starts a server with a free port for each listener, and learns its addresses. */
  async server(...flags) {
    const server = new Program(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", ...flags]);
    this.programs.push(server);
    server.echo = await server.says(/echo on (\S+)/);
    server.page = await server.says(/metrics on (\S+)metrics/);
    return server;
  }

  /** Starts clients of a server. */
  load(server, ...flags) {
    const load = new Program(["load", server.echo, "--duration", "60s", ...flags]);
    this.programs.push(load);
    return load;
  }

  /** Opens a browser with an empty profile, and a page in it. What it complains of is kept in `errors`. */
  async open(options = {}) {
    const { width = 1280, height = 900, ...rest } = options;
    this.browser = await chromium.launchPersistentContext(this.profile, {
      executablePath: "/usr/bin/chromium",
      args: [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
      ],
      viewport: { width, height },
      ...rest,
    });
    this.page = this.browser.pages()[0] ?? await this.browser.newPage();
    this.page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) this.errors.push(`${message.type()}: ${message.text()}`);
    });
    this.page.on("pageerror", (error) => this.errors.push(`exception: ${error.message}`));
    this.page.on("request", (request) => this.requests.push(request.url()));
    return this.page;
  }

  async end() {
    await this.browser?.close();
    await Promise.all(this.programs.map((program) => program.end()));
    rmSync(this.profile, { recursive: true, force: true });
  }
}
