/**
 * Markdown -> elements that are safe to show. The model's HTML is text here, pictures are links (nothing is fetched from
 * elsewhere), and DOMPurify lets through a short list of elements on top of that.
 */

import DOMPurify, { type Config } from "dompurify";
import { Marked, type Token, type Tokens } from "marked";
import { t } from "./words";

const ALLOWED: Config & { RETURN_DOM_FRAGMENT: true } = {
  ALLOWED_TAGS:
    "p br hr h1 h2 h3 h4 h5 h6 strong em del a code pre blockquote ul ol li table thead tbody tr th td div span input".split(" "),
  ALLOWED_ATTR: ["href", "class", "start", "align", "type", "checked", "disabled", "data-tex", "data-display", "data-lang"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

function escaped(text: string): string {
  return text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

interface Formula extends Tokens.Generic {
  tex: string;
  display: boolean;
}

function formula(type: string, raw: string, tex: string, display: boolean): Formula {
  return { type, raw, tex: tex.trim(), display };
}

function shownFormula(token: Tokens.Generic): string {
  const { raw, tex, display } = token as Formula;
  return `<span class="tex" data-tex="${escaped(tex)}"${display ? ' data-display="1"' : ""}>${escaped(raw.trim())}</span>`;
}

const marked = new Marked({
  gfm: true,
  breaks: false,
  extensions: [
    {
      name: "formulaBlock",
      level: "block",
      start: (src) => /\n(?:\$\$|\\\[)/.exec(src)?.index,
      tokenizer(src) {
        const match = /^ {0,3}(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n+|$)/.exec(src);
        return match ? formula("formulaBlock", match[0], match[1] ?? match[2], true) : undefined;
      },
      renderer: (token) => `<p class="display">${shownFormula(token)}</p>`,
    },
    {
      name: "formula",
      level: "inline",
      start: (src) => /\$|\\[([]/.exec(src)?.index,
      tokenizer(src) {
        const display = /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])/.exec(src);
        if (display) return formula("formula", display[0], display[1] ?? display[2], true);
        // a dollar of money has a blank behind it, or a digit after its end
        const inline = /^(?:\$(?![\s$])((?:\\.|[^\\$\n])*?[^\\$\s])\$(?!\d)|\\\(([^]+?)\\\))/.exec(src);
        return inline ? formula("formula", inline[0], inline[1] ?? inline[2], false) : undefined;
      },
      renderer: shownFormula,
    },
  ],
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    code({ text, lang }) {
      const name = /^[\w+#.-]{1,20}/.exec(lang ?? "")?.[0] ?? "";
      return `<div class="code" data-lang="${escaped(name)}"><pre><code>${escaped(text)}</code></pre></div>`;
    },
  },
});

/** Line ends are unified, so that the tokens' sources add up to the text's. */
export function unified(text: string): string {
  return text.replace(/\r\n?/g, "\n");
}

export function blocks(text: string): Token[] {
  return marked.lexer(text);
}

export function shown(tokens: Token[]): DocumentFragment {
  // the lexer's links go along: a reference may be defined in another block
  const list = Object.assign([...tokens], { links: (tokens as { links?: object }).links ?? {} });
  const fragment = DOMPurify.sanitize(marked.parser(list), ALLOWED);
  dress(fragment);
  return fragment;
}

export function rendered(text: string): DocumentFragment {
  return shown(blocks(unified(text)));
}

/** What Markdown has no words for: links that open beside, blocks of code with a bar, tables that scroll. */
function dress(fragment: DocumentFragment): void {
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.getAttribute("href")) continue;
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const box of fragment.querySelectorAll("input")) {
    box.type = "checkbox";
    box.disabled = true;
    box.setAttribute("aria-label", box.closest("li")?.textContent?.trim().slice(0, 80) || t("task"));
  }
  for (const table of fragment.querySelectorAll("table")) scrolls(table, t("table"));
  for (const block of fragment.querySelectorAll<HTMLElement>("div.code")) {
    const bar = document.createElement("div");
    bar.className = "bar";
    const name = document.createElement("span");
    name.textContent = block.dataset.lang || t("code");
    const copy = document.createElement("button");
    copy.type = "button";
    copy.dataset.copy = "code";
    copy.textContent = t("copy");
    bar.append(name, copy);
    const pre = block.querySelector("pre")!;
    pre.tabIndex = 0; // so that the keyboard can scroll it
    block.prepend(bar);
  }
}

function scrolls(table: HTMLTableElement, label: string): void {
  const around = document.createElement("div");
  around.className = "table";
  around.tabIndex = 0;
  around.setAttribute("role", "region");
  around.setAttribute("aria-label", label);
  table.replaceWith(around);
  around.append(table);
}
