/** Formulas and coloured code. Both libraries are fetched when the first reply needs them. */

import DOMPurify from "dompurify";

type Katex = typeof import("katex").default;
type Colours = typeof import("./colours");

let katex: Katex | null = null;
let fetchingKatex: Promise<void> | null = null;
let colours: Colours | null = null;
let fetchingColours: Promise<void> | null = null;
const formulas = new Map<string, HTMLElement>();
const MOST_FORMULAS = 500;

/** Draws the formulas below `root`: at once where KaTeX is there, else when it has come. */
export function drawFormulas(root: ParentNode): void {
  const spans = root.querySelectorAll<HTMLElement>("span.tex:not(.drawn)");
  if (!spans.length) return;
  if (katex) {
    for (const span of spans) draw(katex, span);
    return;
  }
  const waiting = [...spans];
  fetchingKatex ??= Promise.all([import("katex"), import("katex/dist/katex.min.css")]).then(([module]) => {
    katex = module.default;
  });
  void fetchingKatex.then(
    () => waiting.forEach((span) => draw(katex!, span)),
    () => (fetchingKatex = null), // the server is gone: the formulas stay as they were written
  );
}

function draw(with_: Katex, span: HTMLElement): void {
  const { tex = "", display } = span.dataset;
  const name = `${display ?? ""}:${tex}`;
  let made = formulas.get(name);
  if (!made) {
    made = document.createElement("span");
    try {
      with_.render(tex, made, { displayMode: Boolean(display), throwOnError: true, trust: false, maxExpand: 200, maxSize: 20 });
    } catch {
      return; // what is no formula is shown as it was written
    }
    if (formulas.size >= MOST_FORMULAS) formulas.clear();
    formulas.set(name, made);
  }
  span.classList.add("drawn");
  span.replaceChildren(...made.cloneNode(true).childNodes);
}

/** Colours the blocks of code below `root`. */
export function colour(root: ParentNode): void {
  const found = [...root.querySelectorAll<HTMLElement>("div.code[data-lang]")].filter((block) => block.dataset.lang);
  if (!found.length) return;
  if (colours) {
    for (const block of found) paint(colours, block);
    return;
  }
  fetchingColours ??= import("./colours").then((module) => {
    colours = module;
  });
  void fetchingColours.then(
    () => found.forEach((block) => paint(colours!, block)),
    () => (fetchingColours = null),
  );
}

function paint(with_: Colours, block: HTMLElement): void {
  const code = block.querySelector("code");
  const html = code && with_.coloured(code.textContent ?? "", block.dataset.lang ?? "");
  if (!code || !html) return;
  code.replaceChildren(
    DOMPurify.sanitize(html, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }),
  );
}
