/** A conversation's tree of messages, as plain data: every change makes a new one. */

import type { Conversation, Message, Tree } from "./types";

export interface Talk {
  conversation: Conversation;
  byId: ReadonlyMap<string, Message>;
  /** Children in the order they were written; null holds the first messages. */
  kids: ReadonlyMap<string | null, readonly string[]>;
}

export function talkOf(tree: Tree): Talk {
  const byId = new Map<string, Message>();
  const kids = new Map<string | null, string[]>();
  for (const message of tree.messages) {
    byId.set(message.id, message);
    const beside = kids.get(message.parent);
    if (beside) beside.push(message.id);
    else kids.set(message.parent, [message.id]);
  }
  return { conversation: tree.conversation, byId, kids };
}

/** The current branch, from its first message to its leaf. */
export function pathOf(talk: Talk, leaf: string | null = talk.conversation.current): Message[] {
  const path: Message[] = [];
  for (let id = leaf; id !== null; ) {
    const message = talk.byId.get(id);
    if (!message) break;
    path.push(message);
    id = message.parent;
  }
  return path.reverse();
}

export function withMessage(talk: Talk, message: Message): Talk {
  const byId = new Map(talk.byId).set(message.id, message);
  const known = talk.byId.has(message.id);
  const beside = talk.kids.get(message.parent) ?? [];
  const kids = known ? talk.kids : new Map(talk.kids).set(message.parent, [...beside, message.id]);
  return { ...talk, byId, kids };
}

export function withCurrent(talk: Talk, current: string | null): Talk {
  return { ...talk, conversation: { ...talk.conversation, current } };
}

export function withConversation(talk: Talk, change: Partial<Conversation>): Talk {
  return { ...talk, conversation: { ...talk.conversation, ...change } };
}

/** The newest leaf below a message. */
export function leafBelow(talk: Talk, id: string): string {
  for (;;) {
    const next = talk.kids.get(id)?.at(-1);
    if (next === undefined) return id;
    id = next;
  }
}

/** What another tab or program did, without leaving the branch that is shown here unless it only grew. */
export function refreshed(shown: Talk, fresh: Talk): Talk {
  const here = shown.conversation.current;
  if (here === null || !fresh.byId.has(here)) return fresh;
  const grew = pathOf(fresh).some((message) => message.id === here);
  return grew ? fresh : withCurrent(fresh, here);
}
