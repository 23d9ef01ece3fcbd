"""The one place where a chat template is rendered: it comes with a model, and may raise whatever it likes."""

from typing import Any

from jinja2 import TemplateError

from saccade.errors import RecordError, SaccadeError


def apply_chat_template(processor: Any, messages: Any, **options: Any) -> Any:
    """What `processor.apply_chat_template` makes of a conversation, or of several.

    Args:
        processor: of a model, or a tokenizer.
        options: of that method. A `chat_template` is used in place of the processor's own.

    Raises:
        RecordError: if there is no template, or it raises anything, or with `tokenize` the processor does.
    """
    if (options.get("chat_template") or getattr(processor, "chat_template", None)) is None:
        raise RecordError("the processor has no chat template: add chat_template.jinja to the model's folder")
    try:
        return processor.apply_chat_template(messages, **options)
    except SaccadeError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:600]
        # Of others, such as a KeyError, the text alone says little.
        kind = "" if isinstance(error, (TemplateError, ValueError)) and line else f"{type(error).__name__}: "
        what = "the chat template (chat_template.jinja) refuses it"
        if options.get("tokenize"):
            what = "the model's chat template (chat_template.jinja) and processor make no prompt"
        raise RecordError(f"{what}: {kind}{line}") from error
