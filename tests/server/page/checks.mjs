// What a person does with the page, and what must come of it. Each check gets a browser context of its own.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";

export const checks = {};
const GONE = [/Failed to load resource/]; // the browser's own words when a server refuses or is gone

async function opened({ context, url }, path = "/") {
  const page = await context.newPage();
  await page.goto(url + path);
  await page.waitForSelector(".chip strong");
  return page;
}

async function api(url, path, body, headers = {}) {
  const method = body === undefined ? "GET" : "POST";
  const answer = await fetch(`${url}/page/api/${path}`, { method, headers, body: body && JSON.stringify(body) });
  assert.ok(answer.ok, `${path}: ${answer.status} ${await answer.clone().text()}`);
  return answer.json();
}

/** A conversation of these texts, user and assistant in turn. */
async function talkOf(url, title, texts) {
  const talk = await api(url, "conversations", { title });
  let parent = null;
  for (const [place, content] of texts.entries()) {
    const role = place % 2 ? "assistant" : "user";
    parent = (await api(url, `conversations/${talk.id}/messages`, { role, content, parent })).id;
  }
  return talk.id;
}

/** Tries again until it holds, for a while. */
async function eventually(holds) {
  for (let left = 40; ; left--) {
    try {
      return await holds();
    } catch (problem) {
      if (!left) throw problem;
      await new Promise((done) => setTimeout(done, 100));
    }
  }
}

async function limit(page, tokens) {
  if (!(await page.locator("#max_new_tokens").count())) await page.keyboard.press("Control+.");
  await page.fill("#max_new_tokens", String(tokens));
  await page.locator("#max_new_tokens").blur();
}

async function say(page, text) {
  await page.fill("#message", text);
  await page.press("#message", "Enter");
}

async function answered(page, count = 1) {
  await page.waitForFunction((n) => document.querySelectorAll(".stats").length >= n && !document.querySelector(".live, .progress"), count);
}

const lastReply = (page) => page.locator('[data-role="assistant"] .prose').last();

/** Replaces the model by a script: `pieces` come as a stream, `every` milliseconds apart. */
async function scripted(page, pieces, every = 0) {
  await page.evaluate(
    ([texts, pause]) => {
      const real = window.fetch;
      window.fetch = (path, options) => {
        if (path !== "/v1/chat/completions") return real(path, options);
        const line = (delta, reason = null) => `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason: reason }] })}\n\n`;
        const body = new ReadableStream({
          async start(to) {
            const bytes = new TextEncoder();
            for (const text of texts) {
              to.enqueue(bytes.encode(line({ content: text })));
              if (pause) await new Promise((done) => setTimeout(done, pause));
            }
            to.enqueue(bytes.encode(`${line({}, "stop")}data: [DONE]\n\n`));
            to.close();
          },
        });
        return Promise.resolve(new Response(body, { headers: { "content-type": "text/event-stream" } }));
      };
    },
    [pieces, every],
  );
}

// ------------------------------------------------------------------------------------------------------------ talking

checks.send_and_stream = async (job) => {
  const page = await opened(job);
  await limit(page, 40);
  await page.evaluate(() => {
    window.lengths = new Set();
    new MutationObserver(() => {
      const live = document.querySelector(".live");
      if (live) window.lengths.add(live.textContent.length);
    }).observe(document.body, { subtree: true, childList: true, characterData: true });
  });
  await say(page, "Tell me a long story about a lighthouse.");
  await answered(page);
  assert.ok((await page.evaluate(() => window.lengths.size)) >= 3, "the reply came in pieces");
  assert.equal(await page.inputValue("#message"), "");
  const stats = await page.textContent(".stats");
  assert.match(stats, /40 tokens · \d+\.\d tokens\/s · first token \d+\.\d\d s/);
  assert.match(await page.textContent(".meter-words"), /^\d+ of 8,192 tokens$/);
  assert.equal(await page.textContent('.entry-open[aria-current="page"]'), "Tell me a long story about a lighthouse.");
  assert.match(await page.textContent(".chip"), /demo.*bf16/);
  assert.match(await page.textContent(".ending"), /reached its length/);
  return stats;
};

checks.stop_and_continue = async (job) => {
  const page = await opened(job);
  await limit(page, 400);
  await say(page, "Tell me a long story about a lighthouse.");
  await page.waitForFunction(() => (document.querySelector(".live")?.textContent.length ?? 0) > 20);
  await page.keyboard.press("Escape");
  await answered(page);
  assert.equal(await page.textContent(".ending"), "Stopped.");
  const half = await lastReply(page).textContent();
  await limit(page, 16);
  await page.getByRole("button", { name: "Continue" }).click();
  await page.waitForFunction((n) => document.querySelector(".prose").textContent.length > n, half.length);
  await answered(page);
  const whole = await lastReply(page).textContent();
  assert.ok(whole.startsWith(half.trimEnd()), `${whole} goes on from ${half}`);
  assert.equal(await page.locator(".branches").count(), 0, "the reply itself went on");
};

checks.regenerate_branch_reload_find = async (job) => {
  const page = await opened(job);
  await limit(page, 12);
  await page.fill('.control .number[aria-label="Temperature"]', "1");
  await page.locator('.control .number[aria-label="Temperature"]').blur();
  await say(page, "Name an animal called quillfeather.");
  await answered(page);
  const first = await lastReply(page).textContent();
  await page.getByRole("button", { name: "Regenerate" }).click();
  await page.waitForSelector(".branches");
  await answered(page);
  assert.equal((await page.textContent(".branches")).trim(), "2/2");
  await page.getByRole("button", { name: "Previous branch" }).click();
  assert.equal(await lastReply(page).textContent(), first);

  await page.press("#message", "ArrowUp");
  await page.fill(".editor textarea", "Name a plant called mossbell.");
  await page.getByRole("button", { name: "Send as a new branch" }).click();
  await page.waitForSelector("text=mossbell");
  await answered(page);
  assert.equal(await page.textContent('[data-role="user"] .plain'), "Name a plant called mossbell.");
  assert.equal((await page.locator('[data-role="user"] .branches').textContent()).trim(), "2/2");
  const reply = await lastReply(page).textContent();

  await page.reload();
  await page.waitForSelector('[data-role="assistant"] .prose');
  assert.equal(await page.textContent('[data-role="user"] .plain'), "Name a plant called mossbell.");
  assert.equal(await lastReply(page).textContent(), reply);

  // from a new tab: found by a word of the other branch, and shown there
  const other = await opened(job);
  await other.fill("#search", "quillfeath");
  await other.locator(".found").filter({ has: other.locator(".excerpt") }).first().click();
  await other.waitForSelector(".sought");
  assert.equal(await other.textContent('[data-role="user"] .plain'), "Name an animal called quillfeather.");
};

checks.rename_and_delete = async (job) => {
  await talkOf(job.url, "Old name of a talk", ["Hello", "Hi"]);
  const page = await opened(job);
  await page.getByRole("button", { name: "More: Old name of a talk" }).click();
  await page.getByRole("button", { name: "Rename" }).click();
  await page.fill(".entry-name", "Another name");
  await page.press(".entry-name", "Enter");
  await page.reload();
  await page.getByRole("button", { name: "Another name", exact: true }).click();
  await page.waitForSelector('[data-role="assistant"]');
  await page.getByRole("button", { name: "More: Another name" }).click();
  await page.getByRole("button", { name: "Delete" }).click();
  await page.locator("dialog").getByRole("button", { name: "Delete" }).click();
  await page.waitForSelector(".greeting");
  assert.equal(await page.getByRole("button", { name: "Another name", exact: true }).count(), 0);
};

checks.system_prompt_and_sampling = async (job) => {
  const page = await opened(job);
  await page.keyboard.press("Control+.");
  assert.match(await page.getAttribute("#system", "placeholder"), /helpful AI assistant/);
  const number = page.locator('.control .number[aria-label="Temperature"]');
  assert.equal(await number.inputValue(), "0", "the demo model's own is greedy");
  assert.equal(await page.locator('.control .number[aria-label="Repetition penalty"]').inputValue(), "1.1");
  for (const kind of ["Role play", "Language style", "Task", "Behaviour"]) {
    await page.locator(".panel .chips").getByRole("button", { name: kind }).click();
    assert.ok((await page.inputValue("#system")).length > 20, kind);
  }
  await page.fill("#system", "You are a pirate.");
  await page.locator("#top_p").fill("0.5");
  assert.equal(await number.inputValue(), "1", "who cuts means to sample");
  await number.fill("0.7");
  await number.blur();
  await limit(page, 4);
  const asked = page.waitForRequest(/chat\/completions/);
  await say(page, "Who are you?");
  const body = (await asked).postDataJSON();
  assert.deepEqual(body.messages, [
    { role: "system", content: "You are a pirate." },
    { role: "user", content: "Who are you?" },
  ]);
  assert.deepEqual([body.temperature, body.top_p, body.max_tokens, body.top_k], [0.7, 0.5, 4, undefined]);
  await answered(page);
  assert.match(await page.getAttribute(".stats", "title"), /temperature 0\.7\ntop_p 0\.5/);
  await page.reload();
  await page.waitForSelector(".stats");
  await page.keyboard.press("Control+.");
  // the panel is there before what it shows
  await page.waitForFunction(() => document.querySelector("#system")?.value === "You are a pirate.");
  assert.equal(await number.inputValue(), "0.7");
  await page.getByRole("button", { name: "Back to the model's own: Temperature" }).click();
  assert.equal(await number.inputValue(), "1");
};

/** A setting is kept a moment after its last change, and the page may be left before. */
checks.settings_of_a_page_that_closes = async (job) => {
  const id = await talkOf(job.url, "Closing", ["a", "b"]);
  const other = await talkOf(job.url, "Other", ["a", "b"]);
  const settings = async (one) => (await api(job.url, `conversations/${one}`)).conversation.settings;
  const page = await opened(job, `/#${id}`);
  await page.waitForSelector("text=Closing");
  await page.keyboard.press("Control+.");
  await page.fill("#system", "Typed at the last moment.");
  await page.goto("about:blank");
  await eventually(async () => assert.deepEqual(await settings(id), { system: "Typed at the last moment." }));
  // two conversations, changed one right after the other
  const again = await opened(job, `/#${id}`);
  await again.keyboard.press("Control+.");
  await again.fill("#system", "First.");
  await again.evaluate((hash) => (location.hash = hash), other);
  await again.waitForFunction(() => document.querySelector("#system")?.value === "");
  await again.fill("#system", "Second.");
  await eventually(async () => assert.deepEqual([await settings(id), await settings(other)], [{ system: "First." }, { system: "Second." }]));
};

/** An import may bring a system message. It holds until a system prompt is chosen, which then stands for it. */
checks.an_imported_system_message = async (job) => {
  const message = (place, role, content) => ({ id: `m${place}`, parent: place ? `m${place - 1}` : null, role, content, created: place, extra: {} });
  const messages = [message(0, "system", "Speak like a pirate."), message(1, "user", "Hi"), message(2, "assistant", "Arr.")];
  const talk = { title: "Pirate", model: "", settings: {}, created: 0, updated: 1e9, current: "m2", messages };
  const [{ id }] = await api(job.url, "import", { format: "qwenlet.conversations", version: 1, conversations: [talk] });
  const page = await opened(job, `/#${id}`);
  await page.waitForSelector("text=Arr.");
  await limit(page, 2);
  assert.equal(await page.getAttribute("#system", "placeholder"), "Speak like a pirate.", "what is in force is shown");
  const told = async (question) => {
    const asked = page.waitForRequest(/chat\/completions/);
    await say(page, question);
    const { messages } = (await asked).postDataJSON();
    await page.waitForFunction(() => !document.querySelector(".live, .progress"));
    return messages.filter((one) => one.role === "system").map((one) => one.content);
  };
  assert.deepEqual(await told("Again"), ["Speak like a pirate."]);
  await page.fill("#system", "Speak like a king.");
  assert.deepEqual(await told("Once more"), ["Speak like a king."], "the later word");
};

checks.tools = async (job) => {
  const page = await opened(job);
  await page.keyboard.press("Control+.");
  await page.getByRole("checkbox", { name: "Calculator" }).check();
  await page.getByLabel("must call one").check();
  await page.getByLabel("Tools", { exact: true }).fill("[{]");
  await page.waitForSelector(".panel .bad");
  await page.getByLabel("Tools", { exact: true }).fill("");
  await limit(page, 40);
  await say(page, "What is 6 times 7?");
  const card = page.locator(".calls .call");
  await card.getByRole("button", { name: "Run" }).click();
  await card.locator(".given-label", { hasText: "Result" }).waitFor();
  await page.waitForFunction(() => document.querySelectorAll('[data-role="assistant"]').length === 2 && !document.querySelector(".live, .progress"));
  assert.match(await page.textContent(".call-list"), /^calculator\(.*→/s);

  // a tool of one's own: a person says what came of it
  await page.getByRole("checkbox", { name: "Calculator" }).uncheck();
  await page.getByLabel("Tools", { exact: true }).fill('{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}');
  await say(page, "How is the weather in Paris?");
  await page.locator(".answer textarea").fill("<b>sunny</b>");
  await page.getByRole("button", { name: "Send result" }).click();
  await page.waitForFunction(() => document.querySelectorAll('[data-role="assistant"]').length === 4 && !document.querySelector(".live, .progress"));
  assert.match(await page.locator(".calls .given pre").last().textContent(), /<b>sunny<\/b>/);
};

checks.reading_progress = async (job) => {
  const page = await opened(job);
  await limit(page, 2);
  await page.evaluate(() => {
    window.shares = [];
    new MutationObserver(() => {
      const bar = document.querySelector(".progress progress");
      if (bar) window.shares.push(bar.value / bar.max);
    }).observe(document.body, { subtree: true, childList: true, attributes: true });
  });
  await say(page, "The quick brown fox jumps over the lazy dog again. ".repeat(110));
  await answered(page);
  const shares = await page.evaluate(() => window.shares);
  assert.ok(shares.length >= 2 && shares.some((one) => one > 0 && one < 1), `progress: ${shares}`);
};

checks.languages_and_composition = async (job) => {
  const page = await opened(job);
  await page.getByRole("button", { name: "切换到中文" }).click();
  assert.equal(await page.getAttribute("html", "lang"), "zh-CN");
  await page.waitForSelector("text=想聊点什么？");
  await page.reload();
  await page.waitForSelector("text=想聊点什么？");
  await page.locator("#message").focus();
  await page.evaluate(() => {
    const field = document.getElementById("message");
    field.value = "你好";
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }));
  });
  assert.equal(await page.locator('[data-role="user"]').count(), 0, "Enter chose a character");
  await scripted(page, ["你好！**世界**。"]);
  await page.press("#message", "Enter");
  await page.waitForSelector(".prose strong");
  assert.equal(await lastReply(page).textContent(), "你好！世界。\n".trimEnd() + (await lastReply(page).textContent()).slice(6));
  await page.fill("#search", "世界");
  await page.waitForSelector(".found .excerpt");
};

checks.shortcuts = async (job) => {
  const page = await opened(job);
  await page.keyboard.press("Control+/");
  await page.getByRole("heading", { name: "Keyboard shortcuts" }).waitFor();
  await page.keyboard.press("Escape");
  await page.keyboard.press("Control+k");
  await page.waitForFunction(() => document.activeElement?.id === "search");
  await page.keyboard.press("Shift+Escape");
  await page.waitForFunction(() => document.activeElement?.id === "message");
  await page.keyboard.press("Control+b");
  assert.equal(await page.locator("#sidebar").count(), 0);
  await page.keyboard.press("Control+b");
  await page.keyboard.press("Control+.");
  await page.waitForSelector(".panel");
  await page.keyboard.type("one");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("two");
  assert.equal(await page.inputValue("#message"), "one\ntwo");
  await page.keyboard.press("Control+Shift+O");
  await page.reload();
  await page.waitForFunction(() => document.getElementById("message")?.value === "one\ntwo"); // a draft survives
};

checks.typing_right_after_a_new_conversation = async (job) => {
  const id = await talkOf(job.url, "Old", ["A question", "An answer"]);
  const page = await opened(job, `/#${id}`);
  await lastReply(page).waitFor();
  const kept = await page.evaluate(async () => {
    const keys = { key: "O", code: "KeyO", ctrlKey: true, shiftKey: true, bubbles: true, cancelable: true };
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", keys));
    await new Promise((done) => queueMicrotask(done)); // faster than a frame, as a busy machine makes it
    const field = document.getElementById("message");
    field.value = "typed at once";
    field.dispatchEvent(new Event("input", { bubbles: true }));
    await new Promise((done) => setTimeout(done, 300));
    return [location.hash, field.value];
  });
  assert.deepEqual(kept, ["", "typed at once"]);
};

// ------------------------------------------------------------------------------------------------------------ text

const RICH = [
  "# A heading\n\nA paragraph with **bold**, *italics*, `code`, and [a link](https://example.org/x).",
  "| name | value |\n|---|--:|\n| a | 1 |\n| b | 2 |",
  "1. one\n2. two\n   - nested\n\n3. three",
  "- [x] done\n- [ ] open",
  "```python\ndef add(a, b):\n    return a + b  # sum\n```",
  "Inline \\(a^2 + b^2 = c^2\\), $x_1$, $5 and $6, and\n\n$$\\int_0^1 \\frac{x}{2}\\,dx = \\tfrac14$$",
  "> quoted\n> twice",
  "A reference to [somewhere][1].\n\nLast words.\n\n[1]: https://example.org/y",
].join("\n\n");

checks.markdown_code_and_formulas = async (job) => {
  await job.context.grantPermissions(["clipboard-read", "clipboard-write"]);
  const id = await talkOf(job.url, "Rich", ["Show me", RICH]);
  const page = await opened(job, `/#${id}`);
  const reply = lastReply(page);
  await reply.locator(".katex").first().waitFor();
  assert.equal(await reply.locator(".katex").count(), 3, "three formulas, and money is none");
  assert.equal(await reply.locator(".katex-display").count(), 1);
  await page.waitForFunction(async () => (await document.fonts.load("16px KaTeX_Main")).length > 0);
  await reply.locator(".hljs-keyword").first().waitFor();
  assert.equal(await reply.locator("h1").textContent(), "A heading");
  assert.equal(await reply.locator("td").count(), 4);
  assert.equal(await reply.locator('input[type="checkbox"]:disabled').count(), 2);
  const link = reply.locator("a").first();
  assert.equal(await link.getAttribute("rel"), "noopener noreferrer nofollow");
  assert.equal(await reply.locator("a").nth(1).getAttribute("href"), "https://example.org/y");
  await reply.getByRole("button", { name: "Copy" }).click();
  await reply.getByRole("button", { name: "Copied" }).waitFor();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), "def add(a, b):\n    return a + b  # sum");
};

checks.streaming_equals_the_whole = async (job) => {
  const page = await opened(job);
  // three cuts of the same text: every character alone, words, and pieces that end inside a sign
  for (const size of [1, 7, 23]) {
    await page.keyboard.press("Control+Shift+O");
    const pieces = RICH.match(new RegExp(`[^]{1,${size}}`, "g"));
    await scripted(page, pieces, size === 1 ? 0 : 2);
    await say(page, `In pieces of ${size}`);
    await page.waitForFunction(() => document.querySelector(".prose:not(.live) table"));
    await page.waitForFunction(() => document.querySelectorAll(".prose .katex").length === 3 && document.querySelector(".hljs-keyword"));
    const streamed = await lastReply(page).innerHTML();
    await page.reload();
    await page.waitForFunction(() => document.querySelectorAll(".prose .katex").length === 3 && document.querySelector(".hljs-keyword"));
    assert.equal(streamed, await lastReply(page).innerHTML());
  }
};

checks.streaming_is_incremental = async (job) => {
  const page = await opened(job);
  const block = "A paragraph of some words that goes on for a while, with `code` and **weight**.\n\n- one\n- two\n- three\n\n";
  await scripted(page, Array.from({ length: 1600 }, () => block), 1); // 170 kB
  await page.evaluate(() => {
    window.renders = [];
    const real = window.requestAnimationFrame;
    window.requestAnimationFrame = (then) =>
      real((now) => {
        const began = performance.now();
        then(now);
        const length = document.querySelector(".live")?.textContent.length;
        if (length) window.renders.push([length, performance.now() - began]);
      });
  });
  await say(page, "Write a book");
  await page.waitForFunction(() => {
    const live = document.querySelector(".live");
    // the first paint may hold much that is not settled yet
    return window.renders.length > 3 && (live?.childElementCount ?? 0) > 8 && (live.firstElementChild.dataset.kept = "yes");
  });
  const kept = await page.waitForFunction(() => {
    const live = document.querySelector(".live");
    return (live?.textContent.length ?? 0) > 100_000 && (live.firstElementChild.dataset.kept ?? "no");
  });
  assert.equal(await kept.jsonValue(), "yes", "what is settled is left alone");
  await page.waitForFunction(() => !document.querySelector(".live"), undefined, { timeout: 60_000 });
  const renders = (await page.evaluate(() => window.renders)).sort((a, b) => a[0] - b[0]);
  const quarter = Math.floor(renders.length / 4);
  // the middle one: others may use the machine, too
  const usual = (part) => part.map(([, took]) => took).sort((a, b) => a - b)[part.length >> 1];
  const [early, late] = [usual(renders.slice(quarter, 2 * quarter)), usual(renders.slice(-quarter))];
  assert.ok(late < 4 * early + 5, `a step takes ${early.toFixed(2)} ms early and ${late.toFixed(2)} ms late`);
  return `${renders.length} renders, ${early.toFixed(2)} ms each early, ${late.toFixed(2)} ms late`;
};

const ATTACKS = [
  "<script>window.pwned = 1</script>",
  '<img src=x onerror="window.pwned = 1">',
  '<svg><animate onbegin="window.pwned=1" attributeName=x></svg>',
  "[click](javascript:window.pwned=1) [data](data:text/html,<script>window.pwned=1</script>)",
  "[entity](&#106;avascript:window.pwned=1) <javascript:window.pwned=1>",
  "![picture](https://elsewhere.example/track.png) ![x](javascript:window.pwned=1)",
  '```<img src=x onerror=window.pwned=1>\n<img src=x onerror="window.pwned=1">\n```',
  '```html" onmouseover="window.pwned=1\nx\n```',
  "$\\href{javascript:window.pwned=1}{x}$ $\\htmlStyle{color:red}{x}$ $\\includegraphics{https://elsewhere.example/a.png}$",
  '$"><img src=x onerror=window.pwned=1>$',
  '<iframe srcdoc="<script>parent.pwned=1</script>"></iframe><object data=x></object><style>body{display:none}</style>',
  '<form action="https://elsewhere.example"><button>Go</button></form><a href="//elsewhere.example" ping="https://elsewhere.example">x</a>',
  '<math><mtext><table><mglyph><style><img src=x onerror="window.pwned=1"></style></mglyph></table></mtext></math>',
  '<div id="app"></div><input name="body" autofocus onfocus="window.pwned=1">',
  "| <img src=x onerror=window.pwned=1> |\n|---|\n| <script>window.pwned=1</script> |",
  "&lt;script&gt;window.pwned=1&lt;/script&gt;",
];

async function harmless(page) {
  const found = await page.evaluate(() => ({
    pwned: window.pwned,
    elements: document.querySelectorAll("#app :is(script, img, iframe, object, embed, form[action], style, link, animate, base)").length,
    handlers: [...document.querySelectorAll("#app *")].filter((one) => [...one.attributes].some((each) => each.name.startsWith("on"))).length,
    links: [...document.querySelectorAll("#app a")].map((one) => one.getAttribute("href")).filter((href) => href && !/^(https?:|mailto:)/.test(href)),
  }));
  assert.deepEqual(found, { pwned: undefined, elements: 0, handlers: 0, links: [] });
}

checks.nothing_runs = async (job) => {
  const everything = ATTACKS.join("\n\n");
  const id = await talkOf(job.url, ATTACKS[1], [everything, everything]);
  const page = await opened(job, `/#${id}`);
  await page.waitForSelector(".prose table");
  await page.waitForTimeout(300);
  await harmless(page);
  assert.match(await lastReply(page).textContent(), /<script>window\.pwned = 1<\/script>/, "the model's HTML is text");
  for (const link of await page.locator(".prose a").all()) await link.hover().catch(() => undefined);
  await page.keyboard.press("Control+k");
  await page.fill("#search", "pwned");
  await page.waitForSelector(".found .excerpt");
  await harmless(page);
  // while it is streamed, in small pieces
  await page.keyboard.press("Control+Shift+O");
  await scripted(page, everything.match(/[^]{1,5}/g));
  await say(page, everything);
  await page.waitForSelector(".prose:not(.live) table");
  await harmless(page);
  assert.deepEqual(job.seen, []);
  // and the policy itself would stop what slipped through
  const refused = await page.evaluate(async () => {
    const blocked = [];
    document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
    const image = new Image();
    image.src = "https://elsewhere.example/x.png";
    await fetch("https://elsewhere.example/").catch(() => undefined);
    try {
      document.body.insertAdjacentHTML("beforeend", "<b>x</b>");
    } catch {
      blocked.push("trusted-types");
    }
    await new Promise((done) => setTimeout(done, 200));
    return blocked;
  });
  assert.ok(["img-src", "connect-src", "trusted-types"].every((one) => refused.includes(one)), String(refused));
  job.seen.length = 0; // these were meant
};

checks.a_long_paste = async (job) => {
  await job.context.grantPermissions(["clipboard-read", "clipboard-write"]);
  const page = await opened(job);
  await page.evaluate(() => navigator.clipboard.writeText("lorem ipsum dolor ".repeat(58_000))); // 1.04 MB
  await page.locator("#message").focus();
  const began = Date.now();
  await page.keyboard.press("Control+v");
  await page.waitForSelector(".attachments li");
  await page.keyboard.type("Summarize this.");
  const took = Date.now() - began;
  assert.ok(took < 2000, `a paste of 1 MB and a sentence took ${took} ms`);
  assert.match(await page.textContent(".attachments"), /Pasted text\s*1\.0 MB/);
  await page.press("#message", "Enter");
  await page.waitForSelector(".trouble", { timeout: 60_000 });
  assert.match(await page.textContent(".trouble"), /no longer fits the context/);
  const bubble = page.locator('[data-role="user"] .bubble');
  assert.match(await bubble.textContent(), /^Summarize this\..*Show all \(1\.0 MB\)$/s);
  await bubble.getByRole("button").click();
  await page.waitForFunction(() => document.querySelector(".bubble .plain").textContent.length > 1_000_000);
  return `pasted and typed within ${took} ms`;
};
checks.a_long_paste.expects = GONE;

// ------------------------------------------------------------------------------------------------------------ files

checks.export_and_import = async (job) => {
  const id = await talkOf(job.url, "To be carried: a/b", ["Où est la gare?", "À gauche. 在左边。"]);
  const page = await opened(job, `/#${id}`);
  const carried = {};
  for (const form of ["JSON", "Markdown"]) {
    await page.getByRole("button", { name: "More: To be carried: a/b" }).click();
    const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: `Export as ${form}` }).click()]);
    assert.equal(file.suggestedFilename(), `To be carried a b.${form === "JSON" ? "json" : "md"}`);
    carried[form] = await file.path();
  }
  assert.match(await readFile(carried.Markdown, "utf8"), /À gauche\. 在左边。/);
  const kept = JSON.parse(await readFile(carried.JSON, "utf8"));
  assert.equal(kept.format, "qwenlet.conversations");
  await api(job.url, `conversations/${id}/delete`, {});
  await page.reload();
  await page.waitForSelector(".greeting");
  await page.setInputFiles('input[accept*="json"]', carried.JSON);
  await page.waitForSelector("text=À gauche. 在左边。");
  assert.notEqual(await page.evaluate(() => location.hash), `#${id}`);
  const list = await page.locator(".entry-open").allTextContents();
  assert.ok(list.includes("To be carried: a/b"));

  const json = (name, value) => ({ name, mimeType: "application/json", buffer: Buffer.from(typeof value === "string" ? value : JSON.stringify(value)) });
  // another program's: a list of OpenAI's messages, ShareGPT
  await page.setInputFiles('input[accept*="json"]', json("openai.json", { messages: [{ role: "user", content: "Foreign one" }, { role: "assistant", content: "Foreign reply" }] }));
  await page.waitForSelector("text=Foreign reply");
  await page.setInputFiles('input[accept*="json"]', json("share.json", [{ conversations: [{ from: "human", value: "Second foreign" }, { from: "gpt", value: "Shared reply" }] }]));
  await page.waitForSelector("text=Shared reply");
  // and what is none: words, and nothing changes
  const before = (await api(job.url, "conversations")).length;
  for (const bad of ["{", "[1, 2]", { format: "qwenlet.conversations", version: 99, conversations: [] }, { a: { __proto__: 1 } }]) {
    const refused = page.waitForResponse(/\/import$/);
    await page.setInputFiles('input[accept*="json"]', json("bad.json", bad));
    const { message } = (await (await refused).json()).error;
    await page.waitForFunction((words) => document.querySelector(".notice.shown.bad")?.textContent.endsWith(`can't be imported. ${words}`), message);
  }
  assert.equal((await api(job.url, "conversations")).length, before);
};
checks.export_and_import.expects = GONE;

checks.attachments = async (job) => {
  const page = await opened(job);
  await limit(page, 2);
  const input = page.locator('input[type="file"][multiple]');
  await input.setInputFiles([
    { name: "notes.txt", mimeType: "text/plain", buffer: Buffer.from("The password is heron.") },
    { name: "picture.png", mimeType: "image/png", buffer: Buffer.from([0x89, 0x50, 0xff, 0x00]) },
  ]);
  await page.waitForSelector(".notice.shown.bad");
  assert.match(await page.textContent(".notice"), /picture\.png is not text/);
  assert.equal(await page.locator(".attachments li").count(), 1);
  await say(page, "What is the password?");
  await answered(page);
  assert.equal(await page.textContent(".bubble .plain"), "What is the password?\n\nnotes.txt:\n\n```\nThe password is heron.\n```");
};

// ------------------------------------------------------------------------------------------------------------ trouble

checks.server_goes_away = async (job) => {
  const page = await opened(job);
  await limit(page, 2000);
  await say(page, "Tell me a long story about a lighthouse.");
  await page.waitForFunction(() => (document.querySelector(".live")?.textContent.length ?? 0) > 60);
  await page.fill("#message", "what I typed meanwhile");
  await job.ask("kill");
  await page.waitForSelector(".trouble");
  assert.match(await page.textContent(".trouble"), /went away in the middle/);
  assert.match(await page.textContent(".banner"), /does not answer/);
  const half = await lastReply(page).textContent();
  assert.ok(half.length > 60);
  await page.press("#message", "Enter");
  await page.waitForSelector(".notice.shown.bad");
  assert.equal(await page.inputValue("#message"), "what I typed meanwhile");
  await job.ask("restart");
  await page.waitForFunction(() => !document.querySelector(".banner"), undefined, { timeout: 60_000 });
  await page.waitForFunction(() => !document.querySelector(".chip.loading"), undefined, { timeout: 60_000 });
  await page.waitForTimeout(500); // what was not saved is saved now
  await page.reload();
  await page.waitForSelector('[data-role="assistant"] .prose');
  assert.equal((await lastReply(page).textContent()).trim(), half.trim(), "what it wrote is kept");
  await page.waitForFunction(() => document.getElementById("message").value === "what I typed meanwhile");
  await limit(page, 8);
  await page.getByRole("button", { name: "Continue" }).click();
  await page.waitForFunction((n) => document.querySelector(".prose").textContent.length > n, half.length);
};
checks.server_goes_away.expects = [...GONE, /net::ERR/];

checks.two_tabs = async (job) => {
  const id = await talkOf(job.url, "Two tabs", ["Begin", "Begun"]);
  const one = await opened(job, `/#${id}`);
  const two = await opened(job, `/#${id}`);
  for (const page of [one, two]) {
    await page.waitForSelector('[data-role="assistant"]');
    await scripted(page, ["A reply."]);
  }
  await say(one, "From the first");
  await one.waitForFunction(() => document.querySelectorAll('[data-role="assistant"]').length === 2);
  // the other one follows, for it stood where this went on
  await two.waitForFunction(() => document.querySelectorAll('[data-role="assistant"]').length === 2);
  // both at once, from the same message: neither is lost
  await Promise.all([say(one, "Left"), say(two, "Right")]);
  await one.waitForTimeout(800);
  const tree = await api(job.url, `conversations/${id}`);
  const texts = tree.messages.map((message) => message.content);
  assert.ok(texts.includes("Left") && texts.includes("Right"), String(texts));
  assert.match(await one.textContent(".thread"), /Left/);
  assert.match(await two.textContent(".thread"), /Right/);
  await one.reload();
  await one.waitForSelector('[data-role="assistant"]');
  // deleted in one, used in the other
  await two.fill("#message", "words that must not be lost");
  await two.evaluate(() => (window.BroadcastChannel = undefined));
  await api(job.url, `conversations/${id}/delete`, {});
  await two.press("#message", "Enter");
  await two.waitForSelector(".greeting");
  await two.waitForFunction(() => document.getElementById("message").value === "words that must not be lost");
};
checks.two_tabs.expects = GONE;

checks.context_full = async (job) => {
  const page = await withKey(job);
  await limit(page, 8);
  for (let turn = 0; turn < 3; turn++) {
    await say(page, `Turn ${turn}: ${"the sea is wide and blue today ".repeat(12)}`);
    await answered(page, turn + 1);
  }
  await say(page, `Turn 3: ${"the sea is wide and blue today ".repeat(24)}`);
  await page.waitForSelector(".trouble");
  assert.match(await page.textContent(".trouble"), /no longer fits the context.*512 tokens/s);
  assert.match(await page.locator(".bubble").last().textContent(), /^Turn 3/);
  await page.getByRole("button", { name: "Leave out the oldest" }).click();
  await answered(page, 4);
  assert.match(await page.textContent(".aside"), /^\d of the oldest messages were left out/);
  assert.match(await page.textContent(".side-note"), /History is off/);
};
checks.context_full.expects = GONE;

async function withKey(job) {
  const page = await job.context.newPage();
  await page.goto(job.url);
  await page.getByLabel("API key").fill("wrong");
  await page.getByRole("button", { name: "Open" }).click();
  await page.waitForTimeout(200);
  await page.getByLabel("API key").fill("secret");
  await page.getByRole("button", { name: "Open" }).click();
  await page.waitForSelector(".chip strong");
  await page.waitForFunction(() => !document.querySelector("dialog"));
  return page;
}

checks.queue_full = async (job) => {
  const page = await withKey(job);
  await limit(page, 4);
  const stop = new AbortController();
  const headers = { "content-type": "application/json", authorization: "Bearer secret" };
  const body = JSON.stringify({ messages: [{ role: "user", content: "Count." }], stream: true, ignore_eos: true, max_tokens: 400 });
  const busy = await fetch(`${job.url}/v1/chat/completions`, { method: "POST", headers, body, signal: stop.signal });
  await busy.body.getReader().read();
  await say(page, "Is there room?");
  await page.waitForSelector(".trouble");
  assert.match(await page.textContent(".trouble"), /server is busy.*Trying again in 2 s/s);
  stop.abort();
  await answered(page);
  assert.equal(await page.locator(".trouble").count(), 0);
  assert.equal(await page.locator(".bubble").count(), 1);
};
checks.queue_full.expects = GONE;

checks.without_history = async (job) => {
  const page = await withKey(job);
  await limit(page, 4);
  await say(page, "Nobody will remember this.");
  await answered(page);
  await page.getByRole("button", { name: "Regenerate" }).click();
  await page.waitForSelector(".branches");
  await answered(page);
  await page.fill("#search", "remember");
  await page.waitForSelector(".found");
  await page.fill("#search", "");
  await page.getByRole("button", { name: /^More: Nobody/ }).click();
  const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "Export as JSON" }).click()]);
  const kept = JSON.parse(await readFile(await file.path(), "utf8"));
  assert.equal(kept.conversations[0].messages.length, 3);
  await page.reload();
  await page.waitForSelector(".greeting");
  assert.equal(await page.locator(".entry").count(), 0);
  await page.setInputFiles('input[accept*="json"]', await file.path());
  await page.waitForSelector("text=Nobody will remember this.");
};
checks.without_history.expects = GONE;

// ------------------------------------------------------------------------------------------------------------ looks

async function shot(page, shots, name) {
  if (!shots) return;
  // the caret and what hovers are no part of the picture
  await page.mouse.move(0, 0);
  await page.screenshot({ path: `${shots}/${name}.png`, caret: "hide" });
}

const ANSWER = [
  "A **lighthouse** shows ships where the coast is. How far its light reaches depends on the height $h$ of the lamp:",
  "$$d \\approx 3.57\\,\\sqrt{h}\\ \\text{km}$$",
  "| height | reach |\n|--:|--:|\n| 10 m | 11 km |\n| 40 m | 23 km |",
  "```python\ndef reach(height: float) -> float:\n    return 3.57 * height**0.5  # kilometres\n```",
].join("\n\n");

async function pretty(job) {
  const extra = { tokens: { prompt: 61, completion: 128 }, timings: { cache_n: 24, predicted_per_second: 52.4 }, first_token_ms: 180 };
  const talk = await api(job.url, "conversations", { title: "How far a lighthouse reaches" });
  const question = await api(job.url, `conversations/${talk.id}/messages`, { role: "user", content: "How far does the light of a lighthouse reach?" });
  await api(job.url, `conversations/${talk.id}/messages`, { role: "assistant", content: ANSWER, parent: question.id, extra });
  return talk.id;
}

checks.dark_and_phone = async (job) => {
  const id = await pretty(job);
  const page = await opened(job, `/#${id}`);
  await page.waitForFunction(() => document.querySelectorAll(".katex").length === 2 && document.querySelector(".hljs-keyword"));
  await shot(page, job.shots, "page-light");
  const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number));
  const light = await paper();
  assert.ok(Math.min(...light.slice(0, 3)) > 200);
  await page.emulateMedia({ colorScheme: "dark" });
  assert.ok(Math.max(...(await paper()).slice(0, 3)) < 60, "the system's dark is followed");
  await page.emulateMedia({ colorScheme: "light" });
  await page.getByRole("button", { name: "Theme: as the system" }).click();
  await page.getByRole("button", { name: "Theme: light" }).click();
  assert.ok(Math.max(...(await paper()).slice(0, 3)) < 60, "and may be chosen");
  await page.reload();
  await page.waitForSelector(".katex");
  assert.ok(Math.max(...(await paper()).slice(0, 3)) < 60, "for good");
  await page.keyboard.press("Control+.");
  await page.waitForFunction(() => document.querySelector(".hljs-keyword"));
  await shot(page, job.shots, "page-dark");

  const phone = await job.browser.newContext({ viewport: { width: 390, height: 800 }, deviceScaleFactor: 2, hasTouch: true, isMobile: true, locale: "zh-CN" });
  try {
    job.watch(phone, job.url, job.seen);
    const small = await opened({ context: phone, url: job.url }, `/#${id}`);
    await small.waitForFunction(() => document.querySelectorAll(".katex").length === 2);
    const fits = () => small.evaluate(() => document.documentElement.scrollWidth <= innerWidth && document.querySelector("main").scrollWidth <= innerWidth);
    assert.ok(await fits());
    await shot(small, job.shots, "page-phone");
    await small.getByRole("button", { name: "设置" }).click();
    await small.waitForSelector("dialog.sheet");
    assert.ok(await fits());
    await small.keyboard.press("Escape");
    await small.getByRole("button", { name: "对话列表" }).click();
    await small.waitForSelector(".sidebar");
    assert.ok(await fits());
    const target = await small.locator(".entry-more").first().boundingBox();
    assert.ok(target.width >= 36 && target.height >= 30, "large enough for a thumb");
  } finally {
    await phone.close();
  }
};

checks.accessible = async (job) => {
  const source = await readFile(job.require.resolve("axe-core/axe.min.js"), "utf8");
  const id = await talkOf(job.url, "Accessible", ["Show me", RICH, "And more", "Some more text."]);
  const page = await opened(job);
  // by the debugger's door: the page's own policy lets no script in
  const session = await job.context.newCDPSession(page);
  async function clean(where) {
    await page.waitForTimeout(250);
    await session.send("Runtime.evaluate", { expression: source });
    const found = await page.evaluate(async () => {
      const report = await window.axe.run(document, { resultTypes: ["violations"] });
      return report.violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`);
    });
    assert.deepEqual(found, [], where);
  }
  for (const scheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme: scheme });
    await page.goto(`${job.url}/`);
    await page.waitForSelector(".chip strong");
    await clean(`${scheme}: the greeting`);
    await page.goto(`${job.url}/#${id}`);
    await page.waitForFunction(() => document.querySelectorAll(".katex").length === 3 && document.querySelector(".hljs-keyword"));
    await clean(`${scheme}: a conversation`);
    await page.keyboard.press("Control+.");
    await clean(`${scheme}: settings`);
    await page.keyboard.press("Control+/");
    await clean(`${scheme}: shortcuts`);
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: "More: Accessible" }).first().click();
    await clean(`${scheme}: a menu`);
    await page.getByRole("button", { name: "Delete" }).click();
    await clean(`${scheme}: a question`);
    await page.locator("dialog").getByRole("button", { name: "Cancel" }).click();
    await page.press("#message", "ArrowUp");
    await clean(`${scheme}: an editor`);
    await page.keyboard.press("Escape");
    await page.fill("#search", "more text");
    await page.waitForSelector(".found");
    await clean(`${scheme}: results`);
    await page.keyboard.press("Control+.");
  }
  await page.setViewportSize({ width: 390, height: 800 });
  await clean("narrow");
  await page.getByRole("button", { name: "Conversations" }).click();
  await clean("narrow: the drawer");
};

/** The network is cut but for this machine, and whatever tries to leave it is counted. */
checks.offline = async (job) => {
  const { context, outside } = job;
  const away = await context.newPage();
  await away.goto("http://qwenlet.example/").catch(() => undefined);
  assert.ok(outside.some((url) => url.includes("qwenlet.example")), "what leaves is seen");
  await away.close();
  const before = outside.length;
  job.seen.length = 0; // that was this one
  const id = await talkOf(job.url, "Offline", ["Show me", RICH]);
  const page = await opened(job, `/#${id}`);
  await page.waitForFunction(() => document.querySelectorAll(".katex").length === 3 && document.querySelector(".hljs-keyword"));
  await page.evaluate(() => document.fonts.ready);
  await limit(page, 4);
  await say(page, "Hello?");
  await answered(page);
  await page.reload();
  await page.waitForSelector(".stats");
  await page.fill("#search", "Hello");
  await page.waitForSelector(".found");
  assert.deepEqual(outside.slice(before), [], "requests that would have left");
};

// ------------------------------------------------------------------------------------------------------------ speed

checks.first_paint = async (job) => {
  // the quickest of five first visits: others may use the machine, too
  const times = [];
  for (let visit = 0; visit < 5; visit++) {
    const context = await job.browser.newContext();
    const page = await opened({ context, url: job.url });
    times.push(await page.evaluate(() => performance.getEntriesByName("first-contentful-paint")[0].startTime));
    await context.close();
  }
  const painted = Math.min(...times);
  assert.ok(painted < 1000, `the first paint came after ${painted.toFixed(0)} ms`);
  return `first paint after ${painted.toFixed(0)} ms`;
};

/** Milliseconds of the main thread for a step of 600 pixels upwards. What a machine makes of it is not the page's doing, so
 *  long and short conversations are compared. */
async function scrolling(job, page) {
  const session = await job.context.newCDPSession(page);
  await session.send("Performance.enable", { timeDomain: "threadTicks" });
  const worked = async () => (await session.send("Performance.getMetrics")).metrics.find((one) => one.name === "TaskDuration").value;
  const at = () => page.evaluate(() => document.querySelector(".thread").scrollTop);
  await page.mouse.move(600, 300);
  await page.waitForTimeout(300);
  const [before, from, steps] = [await worked(), await at(), 12];
  for (let step = 0; step < steps; step++) {
    await page.mouse.wheel(0, -600);
    await page.evaluate(() => new Promise((done) => requestAnimationFrame(done)));
  }
  const took = ((await worked()) - before) / steps;
  const far = from - (await at());
  assert.ok(far > 4000, `scrolled by ${far} px`);
  return took * 1e3;
}

checks.two_thousand_messages = async (job) => {
  const texts = (place) => (place % 2 ? `Reply ${place}: **bold**, \`code\`.\n\n- one\n- two\n\n\`\`\`python\nprint(${place})\n\`\`\`` : `Question ${place}?`);
  const messages = Array.from({ length: 2000 }, (_, place) => ({
    id: `m${place}`, parent: place ? `m${place - 1}` : null, role: place % 2 ? "assistant" : "user", content: texts(place), created: place, extra: {},
  })); // prettier-ignore
  const imported = (count) => {
    const one = { title: "Long", model: "", settings: {}, created: 0, updated: 1e9, current: `m${count - 1}`, messages: messages.slice(0, count) };
    return api(job.url, "import", { format: "qwenlet.conversations", version: 1, conversations: [one] });
  };
  const [{ id }] = await imported(2000);
  const page = await opened(job);
  await page.evaluate((hash) => (location.hash = hash), id);
  const began = Date.now();
  await page.waitForSelector("text=Reply 1999");
  const shown = Date.now() - began;
  assert.ok(shown < 1500, `the end was there after ${shown} ms`);
  await page.waitForFunction(() => document.querySelectorAll(".row").length === 2000, undefined, { timeout: 60_000 });
  const all = Date.now() - began;
  const end = await page.evaluate(() => { const view = document.querySelector(".thread"); return view.scrollHeight - view.scrollTop - view.clientHeight; }); // prettier-ignore
  assert.ok(end < 80, `the end is still in sight: ${end}`);
  const long = await scrolling(job, page);
  const [short] = await imported(200);
  const other = await opened(job, `/#${short.id}`);
  await other.waitForFunction(() => document.querySelectorAll(".row").length === 200);
  const little = await scrolling(job, other);
  assert.ok(long < 1.5 * little + 2, `a step of scrolling takes ${long.toFixed(1)} ms, of 200 messages ${little.toFixed(1)} ms`);
  await page.bringToFront();
  await page.getByRole("button", { name: "To the end" }).click();
  await page.waitForFunction(() => { const view = document.querySelector(".thread"); return view.scrollHeight - view.scrollTop - view.clientHeight < 80; }); // prettier-ignore
  // typing is not slowed by what is above
  const typed = Date.now();
  await page.keyboard.press("Shift+Escape");
  await page.keyboard.type("quick");
  assert.ok(Date.now() - typed < 3000);
  return `the end after ${shown} ms, all of it after ${all} ms; a step of scrolling: ${long.toFixed(1)} ms, of 200 messages: ${little.toFixed(1)} ms`;
};
