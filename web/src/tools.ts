/** Tools: two that this page can run by itself, and those that a person declares and answers for. */

import type { ToolSettings } from "./types";

export interface Tool {
  type: "function";
  function: { name: string; description?: string; parameters?: object };
}

export const BUILTIN: Record<string, Tool & { run: (given: Record<string, unknown>) => string }> = {
  clock: {
    type: "function",
    function: {
      name: "clock",
      description: "Tells the date and time of the user's machine.",
      parameters: { type: "object", properties: {} },
    },
    run: () => new Date().toString(),
  },
  calculator: {
    type: "function",
    function: {
      name: "calculator",
      description: "Works out an arithmetic expression such as (2 + 3) * 4 ^ 2.",
      parameters: {
        type: "object",
        properties: { expression: { type: "string", description: "The expression" } },
        required: ["expression"],
      },
    },
    run: (given) => String(worked(String(given["expression"] ?? ""))),
  },
};

/** The tools a conversation offers. Throws an Error in words where what was declared is none. */
export function offered(settings: ToolSettings | undefined): Tool[] {
  const found: Tool[] = (settings?.builtin ?? []).filter((name) => name in BUILTIN).map((name) => ({
    type: "function",
    function: BUILTIN[name].function,
  }));
  return [...found, ...declared(settings?.declared ?? "")];
}

export function declared(text: string): Tool[] {
  if (!text.trim()) return [];
  const read: unknown = JSON.parse(text);
  const list = Array.isArray(read) ? read : [read];
  return list.map((one: Partial<Tool> & Tool["function"], place) => {
    const made = one.function ?? one;
    if (typeof made !== "object" || typeof made.name !== "string" || !made.name)
      throw new Error(`[${place}] has no name`);
    return { type: "function", function: made };
  });
}

/** The result of a call of this page's own tools; null for a tool that a person answers for. */
export function ran(name: string, argumentsText: string): string | null {
  const tool = Object.hasOwn(BUILTIN, name) ? BUILTIN[name] : undefined;
  if (!tool) return null;
  try {
    return tool.run(JSON.parse(argumentsText || "{}") as Record<string, unknown>);
  } catch (problem) {
    return `Error: ${problem instanceof Error ? problem.message : String(problem)}`;
  }
}

/** + - * / % ^ and brackets, with the usual precedence; nothing is evaluated as code. */
export function worked(expression: string): number {
  const source = expression.replace(/[×]/g, "*").replace(/[÷]/g, "/").replace(/−/g, "-").replace(/\*\*/g, "^");
  const signs = source.match(/\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|[-+*/%^()]|\S/g) ?? [];
  let at = 0;
  let depth = 0;

  function sum(): number {
    let value = product();
    while (signs[at] === "+" || signs[at] === "-") value = signs[at++] === "+" ? value + product() : value - product();
    return value;
  }
  function product(): number {
    let value = signed();
    while (signs[at] === "*" || signs[at] === "/" || signs[at] === "%") {
      const sign = signs[at++];
      const other = signed();
      value = sign === "*" ? value * other : sign === "/" ? value / other : value % other;
    }
    return value;
  }
  function signed(): number {
    if (signs[at] === "-" || signs[at] === "+") {
      if (++depth > 200) throw new Error("the expression is nested too deeply");
      const value = signs[at++] === "-" ? -signed() : signed();
      depth--;
      return value;
    }
    const base = single();
    if (signs[at] !== "^") return base;
    at++;
    return base ** signed();
  }
  function single(): number {
    const sign = signs[at++];
    if (sign === "(") {
      if (++depth > 200) throw new Error("the expression is nested too deeply");
      const value = sum();
      if (signs[at++] !== ")") throw new Error("a bracket is not closed");
      depth--;
      return value;
    }
    const value = Number(sign);
    if (sign === undefined || Number.isNaN(value)) throw new Error(`${sign ?? "the end"} is not expected here`);
    return value;
  }

  const value = sum();
  if (at < signs.length) throw new Error(`${signs[at]} is not expected here`);
  return value;
}
