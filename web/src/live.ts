/**
 * A reply while it is written. Blocks that can't change any more are made once and left alone; only what is behind them is
 * read again, so the work grows with the text and not with its square. At the end all of it is rendered once, as a reload
 * would.
 */

import { type Token } from "marked";
import { blocks, rendered, shown, unified } from "./markdown";
import { colour, drawFormulas } from "./ornament";

// the last block may grow, and the one before it may turn out to go on: "2" behind a list is its next number
const OPEN_BLOCKS = 2;
// a share of the time, so that typing and scrolling stay smooth however slow the machine
const REST = 3;

export class LiveText {
  private text = "";
  private settled = 0;
  private tail: { raw: string; element: HTMLElement }[] = [];
  private frame = 0;
  private restUntil = 0;
  private ended = false;

  constructor(private readonly host: HTMLElement) {}

  /** The whole text so far; it is shown at the next frame. */
  set(text: string): void {
    if (this.ended) return;
    this.text = text;
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  end(text: string): void {
    cancelAnimationFrame(this.frame);
    this.ended = true;
    show(this.host, text);
  }

  stop(): void {
    cancelAnimationFrame(this.frame);
    this.ended = true;
  }

  private draw(): void {
    this.frame = 0;
    const now = performance.now();
    if (now < this.restUntil) {
      this.frame = requestAnimationFrame(() => this.draw());
      return;
    }
    this.render();
    const took = performance.now() - now;
    this.restUntil = performance.now() + took * REST;
  }

  private render(): void {
    // half of a line end may still come
    const source = unified(this.text.endsWith("\r") ? this.text.slice(0, -1) : this.text);
    const tokens = blocks(source.slice(this.settled));
    const keep = firstOpen(tokens);
    const done = tokens.slice(0, keep);
    if (done.length) {
      this.tail.forEach(({ element }) => element.remove());
      this.tail = [];
      const fragment = shown(done);
      colour(fragment);
      drawFormulas(fragment);
      this.host.append(fragment);
      this.settled += done.reduce((sum, token) => sum + token.raw.length, 0);
    }
    this.renderTail(tokens.slice(keep));
  }

  private renderTail(tokens: Token[]): void {
    for (let place = 0; place < tokens.length; place++) {
      const token = tokens[place];
      const old = this.tail[place];
      if (old?.raw === token.raw) continue;
      if (old && this.grow(old, token)) continue;
      const element = document.createElement("div");
      element.className = "block";
      const fragment = shown([token]);
      drawFormulas(fragment);
      element.append(fragment);
      if (old) old.element.replaceWith(element);
      else this.host.append(element);
      this.tail[place] = { raw: token.raw, element };
    }
    for (const { element } of this.tail.splice(tokens.length)) element.remove();
  }

  /** Code that only became longer keeps its element, and with it the reader's selection. */
  private grow(old: { raw: string; element: HTMLElement }, token: Token): boolean {
    if (token.type !== "code") return false;
    const code = old.element.querySelector("code");
    const text = code?.firstChild;
    const known = code?.textContent ?? "";
    if (!(text instanceof Text) || !token.text.startsWith(known) || !old.raw.includes("\n")) return false;
    text.appendData(token.text.slice(known.length));
    old.raw = token.raw;
    return true;
  }
}

function firstOpen(tokens: Token[]): number {
  let open = OPEN_BLOCKS;
  for (let place = tokens.length - 1; place >= 0; place--) {
    if (tokens[place].type !== "space" && --open === 0) return place;
  }
  return 0;
}

/** A text that is whole. */
export function show(host: HTMLElement, text: string): void {
  const fragment = rendered(text);
  colour(fragment);
  drawFormulas(fragment);
  host.replaceChildren(fragment);
}
