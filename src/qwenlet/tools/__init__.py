"""Tool use in the published ReAct format, which is how Qwen-1 was taught it. No torch in here.

Toolbox          the tools of a request, and which of them the reply may or must call
ToolMessage      a message of a conversation with calls and results
react_messages   such a conversation -> plain messages for `chat.render`
react_replies    a whole one -> the same for training, where each reply stands behind what it was asked with
fit              the same, cut to fit the context
forced_reply     a grammar that holds the whole reply to a call
ReplyParser      the reply, piece by piece -> text, thoughts and calls
parse_reply      the same for a whole reply

toolbox = Toolbox.of(tools=[{"type": "function", "function": {"name": "clock"}}])
messages = react_messages([ToolMessage("user", "What time is it?")], toolbox)
parse_reply("Thought: I look.\\nAction: clock\\nAction Input: {}", toolbox).calls[0].name  # "clock"
"""

from qwenlet.tools.declared import Call, Tool, Toolbox, ToolChoice
from qwenlet.tools.fitting import fit
from qwenlet.tools.forced import forced_reply
from qwenlet.tools.prompt import ToolMessage, continues_thought, react_messages, react_replies
from qwenlet.tools.reply import STOP_TEXT, Arguments, CallBegun, Event, Reply, ReplyParser, Text, Thought, parse_reply

__all__ = [
    "STOP_TEXT",
    "Arguments",
    "Call",
    "CallBegun",
    "Event",
    "Reply",
    "ReplyParser",
    "Text",
    "Thought",
    "Tool",
    "ToolChoice",
    "ToolMessage",
    "Toolbox",
    "continues_thought",
    "fit",
    "forced_reply",
    "parse_reply",
    "react_messages",
    "react_replies",
]
