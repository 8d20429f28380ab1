"""What other libraries, and older releases, call an argument.

A keyword of torch or Keras raises an error that names the keyword here. A keyword of an older release works for one
release, with a DeprecationWarning.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxsparse._checks import message, warn

F = TypeVar("F", bound=Callable[..., Any])

# The optimizers of torch and Keras.
OF_OPTIMIZERS = {"lr": "Write learning_rate=.", "epsilon": "Write eps=.", "amsgrad": "Use js.lazy(optax.amsgrad(...))."}
OF_ADAM = OF_OPTIMIZERS | {
    "betas": "Write b1= and b2=.",
    "beta_1": "Write b1=.",
    "beta_2": "Write b2=.",
    "weight_decay": "Use js.lazy_adamw, or before=optax.add_decayed_weights(...).",
}
# The number of rows of a table, where it is num_rows here.
OF_NUM_ROWS = dict.fromkeys(("num_embeddings", "vocab_size", "num_buckets", "n_features"), "Write num_rows=.")
# The loaders of torch and Keras.
OF_LOADERS = OF_NUM_ROWS | {
    "drop_last": "Write drop_remainder=.",
    "sample_weight": "Write weight=, one for each example.",
    "num_workers": "Leave it out, or use js.stream with prefetch=, batches that a thread makes in advance.",
}
# The readers of pandas.
OF_PANDAS = OF_NUM_ROWS | {
    "sep": "Write delimiter=.",
    "names": "Write columns=.",
    "chunksize": "Write chunk_rows=.",
    "na_values": "Write fill=, the value of an empty number.",
    "usecols": "Name the columns by what they are: label=, numbers=, ids=, hashed=.",
}
# The fit of Keras.
OF_FIT = {
    "num_epochs": "Write epochs=.",
    "validation_data": "Write validation=, batches of them, and metrics=.",
    "callbacks": "Write callback=, one function.",
    "verbose": "Write progress=.",
}


def other_names(
    function: str, answers: Mapping[str, str], *, renamed: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """A decorator that answers keywords which `function` does not have.

    Args:
      function: its name, without "js.".
      answers: by keyword of another library, what to write here. Such a keyword raises TypeError.
      renamed: by keyword of an older release, the new keyword. Such a keyword works, with a DeprecationWarning.
    """
    old_names = dict(renamed or {})

    def decorate(fun: F) -> F:
        if inspect.isclass(fun):
            decorated: Any = fun  # mypy: __init__ is assigned
            decorated.__init__ = decorate(decorated.__init__)
            return fun
        unknown = {name: do for name, do in answers.items() if name not in inspect.signature(fun).parameters}

        @functools.wraps(fun)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if kwargs and not unknown.keys().isdisjoint(kwargs):
                name = next(name for name in kwargs if name in unknown)
                got = f"{kwargs[name]!r}" if isinstance(kwargs[name], str | int | float | tuple) else "a value"
                raise TypeError(message(function, name, "left out: there is none of this name", got, unknown[name]))
            for old, new in old_names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(message(function, old, f"left out when {new}= is given", repr(kwargs[old])))
                    text = f"js.{function}: {old}= is now {new}=. The next release removes the old name."
                    warn(text, DeprecationWarning)
                    kwargs[new] = kwargs.pop(old)
            return fun(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate
