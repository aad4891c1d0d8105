/** What the server keeps and tells. Times are seconds since 1970. */

export type Role = "system" | "user" | "assistant" | "tool";

export interface Settings {
  system?: string;
  sampling?: Sampling;
  tools?: ToolSettings;
}

/** The fields of SamplingParams that were chosen; others are the model's own. */
export interface Sampling {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  max_new_tokens?: number;
  seed?: number;
}

export interface ToolSettings {
  builtin?: string[];
  declared?: string;
  required?: boolean;
}

export interface Conversation {
  id: string;
  title: string;
  model: string;
  current: string | null;
  created: number;
  updated: number;
  settings: Settings;
}

export interface ToolCall {
  id: string;
  type: "function";
  function: { name: string; arguments: string };
}

export interface Timings {
  cache_n?: number;
  prompt_n?: number;
  prompt_ms?: number;
  predicted_n?: number;
  predicted_per_second?: number | null;
}

export interface Extra {
  tool_calls?: ToolCall[];
  tool_call_id?: string;
  reasoning_content?: string;
  finish_reason?: string;
  model?: string;
  sampling?: Sampling;
  timings?: Timings;
  tokens?: { prompt: number; completion: number };
  first_token_ms?: number;
  dropped?: number;
  edited?: boolean;
  [more: string]: unknown;
}

export interface Message {
  id: string;
  parent: string | null;
  role: Role;
  content: string;
  created: number;
  extra: Extra;
}

export interface Tree {
  conversation: Conversation;
  messages: Message[];
}

export interface Found {
  conversation: Conversation;
  message: string | null;
  excerpt: string;
}

export interface ModelFacts {
  name: string;
  context_length: number;
  parameters: number;
  precision: string;
  device: string;
  default_system: string;
  chats: boolean;
  sampling: Required<Omit<Sampling, "max_new_tokens" | "seed">> & { max_new_tokens: number | null };
  temperature_if_cut: number;
}

export interface About {
  version: string;
  state: "loading" | "ready" | "draining";
  trouble: string | null;
  history: boolean;
  model: ModelFacts | null;
}
