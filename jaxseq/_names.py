"""Names in other libraries, and what they are called in jaxseq.

One list has the rows of the tables in docs/coming-from.md and the hints of error messages. Only an error imports it.
`python docs/site/names.py` writes the tables.
"""

from collections.abc import Container
from typing import NamedTuple


class Name(NamedTuple):
    """One row: something in another library, and what to use instead.

    Attributes:
        library: the heading of its table.
        theirs: the text of the left column.
        ours: the text of the right column, and of a hint.
        arguments: keyword arguments that an error answers with a hint.
        option: the option of jaxseq in `ours`; the hint is for functions that have it.
        attributes: names that are looked up in `jaxseq` by mistake, as in `jaxseq.LSTM`.
        hint: the text of a hint, if it is not `ours`.
    """

    library: str
    theirs: str
    ours: str
    arguments: tuple[str, ...] = ()
    option: str = ""
    attributes: tuple[str, ...] = ()
    hint: str = ""


# Not in the tables: arguments of several libraries, and names of jaxseq 0.1.
OTHERS = (
    Name("", "", "`carry`", ("initial_state", "hx", "h0", "h_0", "state", "init_state", "initial_carry"), "carry"),
    Name("", "", "`resets`", ("reset_mask", "episode_starts", "is_first"), "resets"),
    Name(
        "",
        "",
        "`resets`, where `resets[t + 1]` is `done[t]`",
        ("done", "dones", "terminals"),
        "resets",
    ),
    Name("", "", "`reset_state`", ("reset_carry",), "reset_state"),
    Name("", "", "`stop`", ("stop_token", "stop_tokens", "eos_token", "eos_token_id"), "stop"),
    Name("", "", "`length`", ("max_new_tokens", "max_length", "num_steps"), "length"),
    Name("", "", "`temperature`", ("temp",), "temperature"),
    Name("", "", "`order`", ("window", "lags", "window_size", "sequence_length"), "order"),
    Name("", "", "`lengths`", ("sequence_length", "sequence_lengths", "seq_len", "length"), "lengths"),
    Name("", "", "`stride`", ("strides", "window_strides"), "stride"),
    Name("", "", "`dilation`", ("rhs_dilation", "kernel_dilation", "dilation_rate", "rate"), "dilation"),
    Name("", "", "`groups`", ("feature_group_count",), "groups"),
    Name("", "", "the shape of `kernel`, which `*_init` returns", ("kernel_size", "kernel_shape"), "kernel"),
    Name("", "", "`c_in` and `c_out`", ("in_channels", "out_channels", "filters", "output_channels"), "c_out"),
    Name("", "", "`hidden_size`", ("units", "features", "hidden_features", "num_units"), "hidden_size"),
    Name("", "", "`input_size`", ("in_features", "input_features"), "input_size"),
    Name("", "", "`dtype`", ("param_dtype",), "dtype"),
    Name("", "", "`w_x_init`", ("kernel_init", "kernel_initializer", "w_i_init"), "w_x_init"),
    Name(
        "",
        "",
        "`w_h_init`",
        ("recurrent_kernel_init", "recurrent_initializer", "recurrent_kernel_initializer"),
        "w_h_init",
    ),
    Name("", "", "`kernel_init`", ("kernel_initializer", "w_init"), "kernel_init"),
    Name("", "", "`use_bias`", ("with_bias", "bias"), "use_bias"),
    Name(
        "",
        "",
        "`params._replace(...)` to set the bias",
        ("bias_init", "bias_initializer", "b_init", "forget_bias", "unit_forget_bias"),
        "use_bias",
    ),
    Name("", "", "`kernel_init`", ("depthwise_initializer", "pointwise_initializer"), "kernel_init"),
    Name("", "", "`key`", ("rng", "rngs", "prng_key", "seed"), "key"),
    Name("", "", "`activation`", ("nonlinearity", "activation_fn"), "activation"),
    Name("", "", "`checkpoint`", ("remat",), "checkpoint"),
    Name("", "", "a rate of 0 for evaluation", ("deterministic", "training", "train", "inference"), "dropout"),
    Name("", "", "`recurrent_dropout_mask`", ("drop",), "recurrent_dropout_mask"),
    Name("", "", "`zoneout`", ("hold",), "zoneout"),
)

TORCH = "PyTorch"
FLAX = "Flax"
KERAS = "Keras"
HAIKU = "Haiku"
EQUINOX = "Equinox"
JAX = "JAX"

NAMES = (
    Name(
        TORCH,
        "`nn.LSTM(D, H)`, `nn.GRU`, `nn.RNN`",
        "`jaxseq.lstm(params, carry, xs)`, `gru`, `rnn`; `params = jaxseq.lstm_init(key, D, H)`",
    ),
    Name(TORCH, "`batch_first=True`", "`time_axis=1`", ("batch_first",), "time_axis"),
    Name(
        TORCH,
        "`pack_padded_sequence`, `enforce_sorted`",
        "`lengths=`; sequences stay padded, in any order",
        ("enforce_sorted",),
        "lengths",
        ("pack_padded_sequence", "pad_packed_sequence"),
    ),
    Name(
        TORCH,
        "`num_layers=2`, `dropout=p`",
        "`jaxseq.stack(jaxseq.lstm, [params_0, params_1], carry, xs, dropout=p, key=key)`",
        ("num_layers", "dropout"),
    ),
    Name(
        TORCH,
        "`bidirectional=True`",
        "`jaxseq.bidirectional(jaxseq.lstm, [forwards, backwards], carry, xs)`",
        ("bidirectional",),
    ),
    Name(TORCH, "`proj_size`", "`jaxseq.recurrence(jaxseq.cells.projected_lstm, ...)`", ("proj_size",)),
    Name(
        TORCH, "`bias=False`", "a bias of None: `params._replace(b=None)`", ("bias", "use_bias", "with_bias"), "params"
    ),
    Name(
        TORCH,
        "`output, (h_n, c_n)`",
        "`(h, c), ys`: the carry comes first; `stack` returns a tuple of carries, one for each layer",
    ),
    Name(TORCH, "`nn.LSTMCell`", "`jaxseq.lstm_cell`"),
    Name(TORCH, "`h.detach()` every k steps (TBPTT)", "`truncation=k`", ("detach", "tbptt", "bptt"), "truncation"),
    Name(TORCH, "`torch.utils.checkpoint`", '`checkpoint="auto"`, or a number of steps'),
    Name(
        TORCH,
        "`nn.Conv1d` to `Conv3d`",
        "`jaxseq.conv`; the channel axis is last, kernels are `(*kernel_size, in / groups, out)`",
        attributes=("Conv1d", "Conv2d", "Conv3d", "conv1d", "conv2d", "conv3d"),
    ),
    Name(TORCH, "`nn.Conv2d(kernel_size=3)`", "the kernel size `(3, 3)`: an integer is one spatial axis"),
    Name(TORCH, "`F.pad` on the left, then `Conv1d`", '`padding="CAUSAL"`, or `jaxseq.causal_conv` for streams'),
    Name(
        TORCH,
        "`padding_mode`",
        "`jnp.pad`, which has other modes, before `jaxseq.conv`",
        ("padding_mode",),
    ),
    Name(
        TORCH,
        "`nn.ConvTranspose1d` to `3d`",
        "`jaxseq.conv_transpose`",
        attributes=("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    ),
    Name(TORCH, "`groups=in_channels`", "`jaxseq.depthwise_conv`"),
    Name(TORCH, "`torch.autograd.gradcheck`", "`jaxseq.testing.check_vjp`", attributes=("gradcheck",)),
    Name(TORCH, "`torch.autograd.Function`", "`jax.custom_vjp`, or a `jaxseq.Cell` with a pullback"),
    Name(
        FLAX,
        "`nn.RNN(nn.LSTMCell(H))`",
        "`jaxseq.lstm(params, carry, xs, time_axis=1)`: Flax is batch first, jaxseq is time first by default",
    ),
    Name(FLAX, "`seq_lengths=`", "`lengths=`", ("seq_lengths",), "lengths"),
    Name(FLAX, "`time_major=`", "`time_axis=0` or `1`", ("time_major",), "time_axis"),
    Name(
        FLAX,
        "`return_carry=True`",
        "the carry is always returned, first",
        ("return_carry",),
        hint="no option: the carry is always returned, first",
    ),
    Name(
        FLAX,
        "`reverse=True, keep_order=True`",
        "`reverse=True`; `ys[t]` always belongs to `xs[t]`",
        ("keep_order",),
        "reverse",
    ),
    Name(FLAX, "`initial_carry=`", "`carry`, or None for zeros"),
    Name(FLAX, "`nn.Bidirectional`", "`jaxseq.bidirectional`", attributes=("Bidirectional",)),
    Name(
        FLAX,
        "`OptimizedLSTMCell`, `LSTMCell`, `GRUCell`, `MGUCell`, `SimpleCell`",
        "`lstm`, `lstm`, `gru`, `recurrence(cells.mgu, ...)`, `rnn`",
    ),
    Name(FLAX, "`carry = (c, h)` of `LSTMCell`", "`LSTMState(h, c)`: the other order"),
    Name(FLAX, "`ConvLSTMCell`", "`jaxseq.conv_lstm`", attributes=("ConvLSTMCell", "ConvLSTM")),
    Name(FLAX, '`nn.Conv`, with `padding="SAME"` by default', '`jaxseq.conv`, with `padding="VALID"` by default'),
    Name(
        FLAX,
        "`nn.ConvTranspose`",
        "`jaxseq.conv_transpose`; its padding differs, so convert weights and options with `jaxseq.convert`",
        attributes=("ConvTranspose",),
    ),
    Name(FLAX, "`nn.Conv(feature_group_count=)`", "`jaxseq.conv(groups=)`"),
    Name(FLAX, "`nn.remat`", "`checkpoint=`"),
    Name(KERAS, "`layers.LSTM(H)`, `GRU`, `SimpleRNN`", "`jaxseq.lstm`, `gru`, `rnn`, with `time_axis=1`"),
    Name(
        KERAS,
        "`mask=`, `layers.Masking`",
        "`lengths=` for padding at the end; `zoneout=` with booleans for steps that are missing anywhere",
        ("mask", "masking"),
        "lengths",
    ),
    Name(
        KERAS,
        "`return_sequences=True`, `return_state=True`",
        "both are always returned: `(carry, ys)`; `return_states=True` returns every state",
        ("return_sequences", "return_state"),
        hint="nothing: both are always returned, `(carry, ys)`",
    ),
    Name(
        KERAS,
        "`stateful=True`",
        "pass the returned carry to the next call",
        ("stateful",),
        "carry",
        hint="the returned carry as `carry` of the next call",
    ),
    Name(
        KERAS,
        "`go_backwards=True`",
        "`reverse=True`; the outputs stay in the order of the inputs",
        ("go_backwards",),
        "reverse",
    ),
    Name(
        KERAS,
        "`recurrent_dropout=p`",
        "`stack(..., recurrent_dropout=p, key=key)`, or `recurrent_dropout_mask=`",
        ("recurrent_dropout",),
        "recurrent_dropout_mask",
    ),
    Name(KERAS, "`reset_after=False`", "`recurrence(cells.classic_gru, ...)`", ("reset_after",), "resets"),
    Name(KERAS, '`padding="causal"`, `"same"`', '`padding="CAUSAL"`, `"SAME"`'),
    Name(
        KERAS,
        '`data_format="channels_first"`',
        "channels are last: `jnp.moveaxis(x, 1, -1)`",
        ("data_format", "dimension_numbers"),
        hint="`jnp.moveaxis(x, 1, -1)`: channels are last",
    ),
    Name(
        KERAS,
        "`DepthwiseConv1D`, `SeparableConv1D`",
        "`depthwise_conv`, `separable_conv`",
        attributes=("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
    ),
    Name(KERAS, "`ConvLSTM2D`", "`conv_lstm`", attributes=("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")),
    Name(HAIKU, "`hk.dynamic_unroll(hk.LSTM(H), xs, state)`", "`jaxseq.lstm(params, carry, xs)`"),
    Name(HAIKU, "`hk.ResetCore`", "`resets=`", ("should_reset",), "resets", ("ResetCore",)),
    Name(HAIKU, "`hk.static_unroll`", "`unroll=`"),
    Name(HAIKU, "`hk.GRU` (reset gate before the product)", "`recurrence(cells.classic_gru, ...)`"),
    Name(HAIKU, "`hk.VanillaRNN`", "`jaxseq.rnn`", attributes=("VanillaRNN",)),
    Name(HAIKU, "`hk.Conv2DLSTM`", "`jaxseq.conv_lstm`", attributes=("Conv1DLSTM", "Conv2DLSTM", "Conv3DLSTM")),
    Name(HAIKU, "`hk.DeepRNN`", "`jaxseq.stack`", attributes=("DeepRNN",)),
    Name(EQUINOX, "`eqx.nn.LSTMCell`, `GRUCell` in `lax.scan`", "`jaxseq.lstm`, `gru`"),
    Name(
        EQUINOX,
        "`jax.vmap` over a batch",
        "batch axes of `xs`: one weight gradient instead of one for each example",
    ),
    Name(EQUINOX, "`eqx.nn.Conv1d`, channels first", "`jaxseq.conv`, channels last"),
    Name(EQUINOX, "`eqx.nn.ConvTranspose1d`", "`jaxseq.conv_transpose`"),
    Name(EQUINOX, '`eqx.internal.scan(kind="checkpointed")`', "`checkpoint=`"),
    Name(
        JAX,
        "`lax.scan(step, init, xs)`",
        "`jaxseq.scan(step, init, xs)`, with `truncation` and `checkpoint`",
    ),
    Name(JAX, "`jax.checkpoint` around a step", "`checkpoint=`"),
    Name(
        JAX,
        "`lax.conv_general_dilated`",
        "`jaxseq.conv`; `lhs_dilation` is `conv_transpose`, `rhs_dilation` is `dilation`, `feature_group_count` is "
        "`groups`",
        ("lhs_dilation", "input_dilation"),
        attributes=("conv_general_dilated",),
        hint="`jaxseq.conv_transpose`",
    ),
    Name(
        JAX,
        "`jax.test_util.check_grads`",
        "`jaxseq.testing.check_vjp` ([what each finds](checkers.md))",
        attributes=("check_grads",),
        hint="`jaxseq.testing.check_vjp`",
    ),
)

# Classes of other libraries by their names here, and names in submodules.
ATTRIBUTES = {
    "LSTM": "lstm",
    "LSTMCell": "lstm_cell",
    "OptimizedLSTMCell": "lstm",
    "GRU": "gru",
    "GRUCell": "gru_cell",
    "RNN": "rnn",
    "SimpleRNN": "rnn",
    "SimpleCell": "rnn_cell",
    "RNNCell": "rnn_cell",
    "Conv": "conv",
    "ConvGRU": "conv_gru",
    "Stack": "stack",
    "StackedRNNCells": "stack",
    "SeparableConv1d": "separable_conv",
    "initialize_carry": "zero_state",
    "initial_state": "zero_state",
    "mgu": "cells.mgu",
    "MGU": "cells.mgu",
    "MGUCell": "cells.mgu",
    "slstm": "cells.slstm",
    "indrnn": "cells.indrnn",
    "sample": "autoregressive.sample",
    "generate": "autoregressive.sample",
    "fit": "autoregressive.fit",
    "forecast": "autoregressive.forecast",
    "check_vjp": "testing.check_vjp",
}


def hint_for_argument(argument: str, parameters: Container[str]) -> str:
    """Return what to use instead of `argument` of another library, in a function with these parameters, or ''."""
    for name in (*NAMES, *OTHERS):
        if argument in name.arguments and (not name.option or name.option in parameters):
            return name.hint or name.ours
    return ""


def hint_for_attribute(attribute: str) -> str:
    """Return what to use instead of the name `attribute` of another library, or ''."""
    if attribute in ATTRIBUTES:
        return f"`jaxseq.{ATTRIBUTES[attribute]}`"
    return next((name.hint or name.ours for name in NAMES if attribute in name.attributes), "")
