/** Where conversations are kept: with the server, or, where its history is off, in this page until it is closed. */

import { call, text } from "./http";
import { leafBelow, talkOf } from "./tree";
import type { Conversation, Extra, Found, Message, Role, Settings, Tree } from "./types";

export type Form = "json" | "markdown";

export interface Change {
  title?: string;
  settings?: Settings;
  current?: string;
}

export interface Draft {
  parent: string | null;
  role: Role;
  content: string;
  extra?: Extra;
}

export interface History {
  list(offset: number): Promise<Conversation[]>;
  search(words: string): Promise<Found[]>;
  create(model: string, settings: Settings): Promise<Conversation>;
  /** `last`: the page is closing, and the call has to outlive it. */
  change(id: string, change: Change, last?: boolean): Promise<void>;
  remove(id: string): Promise<void>;
  tree(id: string): Promise<Tree>;
  add(id: string, draft: Draft): Promise<Message>;
  update(message: string, content: string, extra: Extra, last?: boolean): Promise<void>;
  /** null: all of them. */
  save(id: string | null, form: Form): Promise<string>;
  load(file: string): Promise<Conversation[]>;
}

const API = "/page/api";
export const PAGE = 60;
// browsers let a page that is closing send this much
const LAST_WORDS = 60_000;

export class Kept implements History {
  list(offset: number): Promise<Conversation[]> {
    return call(`${API}/conversations?limit=${PAGE}&offset=${offset}`);
  }
  search(words: string): Promise<Found[]> {
    return call(`${API}/search?text=${encodeURIComponent(words)}`);
  }
  create(_model: string, settings: Settings): Promise<Conversation> {
    return call(`${API}/conversations`, { body: { settings } });
  }
  async change(id: string, change: Change, last = false): Promise<void> {
    const keepalive = last && JSON.stringify(change).length < LAST_WORDS;
    await call(`${API}/conversations/${id}`, { body: change, keepalive });
  }
  async remove(id: string): Promise<void> {
    await call(`${API}/conversations/${id}/delete`, { body: {} });
  }
  tree(id: string): Promise<Tree> {
    return call(`${API}/conversations/${id}`);
  }
  add(id: string, draft: Draft): Promise<Message> {
    return call(`${API}/conversations/${id}/messages`, { body: draft });
  }
  async update(message: string, content: string, extra: Extra, last = false): Promise<void> {
    const body = { content, extra };
    await call(`${API}/messages/${message}`, { body, keepalive: last && content.length < LAST_WORDS });
  }
  save(id: string | null, form: Form): Promise<string> {
    return text(id === null ? `${API}/export?form=${form}` : `${API}/conversations/${id}/export?form=${form}`);
  }
  load(file: string): Promise<Conversation[]> {
    return call(`${API}/import`, { text: file });
  }
}

export class Forgotten implements History {
  private trees = new Map<string, Tree>();
  private count = 0;

  private found(id: string): Tree {
    const tree = this.trees.get(id);
    if (!tree) throw new Error(`there is no conversation ${id}`);
    return tree;
  }
  async list(offset: number): Promise<Conversation[]> {
    const all = [...this.trees.values()].map((tree) => tree.conversation);
    return all.sort((a, b) => b.updated - a.updated).slice(offset, offset + PAGE);
  }
  async search(words: string): Promise<Found[]> {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const has = (text: string) => wanted.every((word) => text.toLowerCase().includes(word));
    const found: Found[] = [];
    for (const { conversation, messages } of this.trees.values()) {
      if (has(conversation.title)) found.push({ conversation, message: null, excerpt: conversation.title });
      for (const message of messages)
        if (has(message.content)) found.push({ conversation, message: message.id, excerpt: message.content.slice(0, 90) });
    }
    return found;
  }
  async create(model: string, settings: Settings): Promise<Conversation> {
    const now = Date.now() / 1000;
    const id = `here_${++this.count}`;
    const conversation = { id, title: "", model, current: null, created: now, updated: now, settings };
    this.trees.set(id, { conversation, messages: [] });
    return conversation;
  }
  async change(id: string, change: Change): Promise<void> {
    const tree = this.found(id);
    const current = change.current && leafBelow(talkOf(tree), change.current);
    tree.conversation = { ...tree.conversation, ...change, ...(current ? { current } : {}) };
  }
  async remove(id: string): Promise<void> {
    this.trees.delete(id);
  }
  async tree(id: string): Promise<Tree> {
    return this.found(id);
  }
  async add(id: string, draft: Draft): Promise<Message> {
    const tree = this.found(id);
    const made = { id: `${id}_${tree.messages.length}`, created: Date.now() / 1000, ...draft, extra: draft.extra ?? {} };
    tree.messages = [...tree.messages, made];
    const title = tree.conversation.title || (draft.role === "user" ? draft.content.trim().split("\n")[0].slice(0, 60) : "");
    tree.conversation = { ...tree.conversation, title, current: made.id, updated: made.created };
    return made;
  }
  async update(message: string, content: string, extra: Extra): Promise<void> {
    for (const tree of this.trees.values())
      tree.messages = tree.messages.map((one) => (one.id === message ? { ...one, content, extra } : one));
  }
  private adopt(tree: Tree): Conversation {
    const id = `here_${++this.count}`;
    const own = (message: string | null) => (message === null ? null : `${id}_${message}`);
    const messages = tree.messages.map((one) => ({ ...one, id: own(one.id)!, parent: own(one.parent) }));
    const conversation = { ...tree.conversation, id, current: own(tree.conversation.current) };
    this.trees.set(id, { conversation, messages });
    return conversation;
  }
  save(id: string | null, form: Form): Promise<string> {
    const trees = id === null ? [...this.trees.values()] : [this.found(id)];
    return text(`${API}/render?form=${form}`, { body: { conversations: trees } });
  }
  async load(file: string): Promise<Conversation[]> {
    const trees = await call<Tree[]>(`${API}/read`, { text: file });
    return trees.map((tree) => this.adopt(tree));
  }
}
