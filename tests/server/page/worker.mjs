// Runs browser checks one after the other: a line of JSON in, {"check", "url", ...}; a line out, {"ok"} or {"error"}.
// While a check runs it may ask for something that only the tests can do: {"ask": "kill"}, answered by a line.

import { createServer } from "node:http";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(new URL("../../../web/package.json", import.meta.url));
const { chromium } = require("playwright-core");
const { checks } = await import("./checks.mjs");

// All that does not go to this machine goes to a proxy, and that is here: it counts and refuses. The network is cut.
// One host is not counted: Chrome asks its maker what the fields of any page are for, which is not the page's doing.
const outside = [];
const BROWSERS_OWN = "content-autofill.googleapis.com:443";
const proxy = createServer((request, answer) => {
  outside.push(request.url);
  answer.writeHead(403).end();
});
proxy.on("connect", (request, socket) => {
  if (request.url !== BROWSERS_OWN) outside.push(request.url);
  socket.end("HTTP/1.1 403 Forbidden\r\n\r\n");
});
await new Promise((done) => proxy.listen(0, "127.0.0.1", done));

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  proxy: { server: `http://127.0.0.1:${proxy.address().port}`, bypass: "127.0.0.1" },
  args: ["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"],
});
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

function write(data) {
  process.stdout.write(`${JSON.stringify(data)}\n`);
}

async function ask(what) {
  write({ ask: what });
  return JSON.parse((await lines.next()).value);
}

// what no check may ever see, unless it says why
function watch(context, url, seen) {
  context.on("page", (page) => {
    page.setDefaultTimeout(20_000);
    page.on("pageerror", (error) => seen.push(`error in the page: ${error.message}`));
    page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) seen.push(`console: ${message.text()}`);
    });
    page.on("request", (request) => {
      const to = new URL(request.url());
      if (to.origin !== new URL(url).origin && !["blob:", "data:"].includes(to.protocol)) seen.push(`a request left: ${to}`);
    });
  });
}

for (let line; !(line = await lines.next()).done; ) {
  const job = JSON.parse(line.value);
  const seen = [];
  const context = await browser.newContext({ viewport: { width: 1200, height: 800 }, locale: "en-US", acceptDownloads: true });
  try {
    watch(context, job.url, seen);
    const check = checks[job.check];
    const expected = check.expects ?? [];
    const said = await check({ context, browser, outside, ask, watch, seen, require, ...job });
    const bad = seen.filter((words) => !expected.some((pattern) => pattern.test(words)));
    write(bad.length ? { error: bad.join("\n") } : { ok: said ?? null });
  } catch (error) {
    write({ error: `${error.stack ?? error}\n${seen.join("\n")}` });
  } finally {
    await context.close();
  }
}
await browser.close();
proxy.close();
