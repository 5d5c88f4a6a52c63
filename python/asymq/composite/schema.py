"""The schema of every operator: those of csrc/ops/schema.cpp."""


def _kind(whose: str = "") -> str:
    return (
        f"int {whose}parameterization, int {whose}bits, float {whose}eps, int {whose}link, "
        f"float {whose}gradient_scale"
    )


def _quantizer(whose: str = "") -> str:
    return f"Tensor[] {whose}ranges, {_kind(whose)}, bool {whose}token, int? {whose}group"


def _range(whose: str = "") -> str:
    return (
        f"str {whose}parameterization, Tensor[] {whose}parameters, int {whose}bits, "
        f"bool {whose}symmetric, bool {whose}sigmoid, float {whose}eps, bool {whose}full_range, "
        f"bool {whose}token, int? {whose}group, str {whose}link, float {whose}gradient_scale"
    )


def _tensors(count: int) -> str:
    return f"bool[{count}] needs) -> ({', '.join(['Tensor'] * count)})"


_GRANULAR = f"Tensor first, Tensor? second, Tensor? min, Tensor? max, {_kind()}"
_LIVE = f"Tensor first, Tensor? second, int? group, {_kind()}, bool token"
_SCALED = "float gradient_scale=1"
_LINKED = 'str link="identity", float gradient_scale=1'
_CODES = "Tensor scale, Tensor? offset, int bits, float eps=1e-8, bool full_range=False"
_SOFTMAX = (
    f"Tensor? mask, bool causal, int? window, {_quantizer('scores_')}, "
    f"{_quantizer('probabilities_')}"
)
_ATTENTION = _SOFTMAX.replace("int? window", "int? window, float scaling")
_GELU = f"Tensor x, {_quantizer('input_')}, {_quantizer('output_')}"
_GLU = "Tensor gate, Tensor up, int activation, " + ", ".join(
    _quantizer(whose) for whose in ("gate_", "activation_", "up_", "product_")
)

SCHEMAS = (
    # Fake-quantize.
    "fake_quantize_scale_offset(Tensor x, Tensor scale, Tensor offset, int bits, float eps=1e-8, "
    f"{_SCALED}) -> Tensor",
    "fake_quantize_min_max(Tensor x, Tensor min, Tensor max, int bits, float eps=1e-8, "
    f"{_SCALED}) -> Tensor",
    "fake_quantize_beta_gamma(Tensor x, Tensor beta, Tensor gamma, Tensor min, Tensor max, "
    f"int bits, bool sigmoid=False, float eps=1e-8, {_LINKED}) -> Tensor",
    "fake_quantize_kscale_koffset(Tensor x, Tensor kscale, Tensor koffset, int bits, "
    f"float eps=1e-8, {_SCALED}) -> Tensor",
    "fake_quantize_symmetric_scale(Tensor x, Tensor scale, int bits, float eps=1e-8, "
    f"bool full_range=False, {_SCALED}) -> Tensor",
    "fake_quantize_symmetric_max(Tensor x, Tensor max, int bits, float eps=1e-8, "
    f"bool full_range=False, {_SCALED}) -> Tensor",
    "fake_quantize_symmetric_gamma(Tensor x, Tensor gamma, Tensor max, int bits, "
    f"bool sigmoid=False, float eps=1e-8, bool full_range=False, {_LINKED}) -> Tensor",
    "fake_quantize_dynamic_beta_gamma(Tensor x, Tensor beta, Tensor gamma, int? group, int bits, "
    f"bool sigmoid=False, float eps=1e-8, {_LINKED}) -> Tensor",
    "fake_quantize_dynamic_symmetric_gamma(Tensor x, Tensor gamma, int? group, int bits, "
    f"bool sigmoid=False, bool full_range=False, float eps=1e-8, {_LINKED}) -> Tensor",
    "_fake_quantize_live(Tensor x, Tensor first, Tensor? second, int? group, int bits, "
    f"bool sigmoid=False, bool full_range=False, float eps=1e-8, {_LINKED}) -> Tensor",
    f"_fake_quantize(Tensor x, {_GRANULAR}) -> Tensor",
    f"_fake_quantize_backward(Tensor grad, Tensor x, {_GRANULAR}, {_tensors(3)}",
    f"_fake_quantize_dynamic(Tensor x, {_LIVE}) -> Tensor",
    f"_fake_quantize_dynamic_backward(Tensor grad, Tensor x, {_LIVE}, {_tensors(3)}",
    # Ranges and codes.
    "effective_scale_offset(str parameterization, Tensor[] parameters, int bits, "
    "bool symmetric=False, bool sigmoid=False, float eps=1e-8, bool full_range=False, "
    'str link="identity") -> Tensor[]',
    f"_effective_scale_offset({_GRANULAR}) -> (Tensor, Tensor)",
    "parameters_of_range(str parameterization, Tensor min, Tensor max, int bits, "
    "bool symmetric=False, bool sigmoid=False, bool full_range=False, "
    'str link="identity") -> Tensor[]',
    "range_of_extrema(Tensor min, Tensor max, int bits, bool symmetric=False, "
    "bool force_zero=True, float fallback=1.0, float eps=1e-8, bool full_range=False) -> "
    "(Tensor min, Tensor max, Tensor without_width)",
    f"quantize(Tensor x, {_CODES}) -> Tensor",
    f"update_codes_(Tensor(a!) codes, Tensor x, {_CODES}) -> Tensor",
    f"dequantize(Tensor codes, {_CODES}) -> Tensor",
    # Operators that do more than quantize.
    f"quantized_softmax(Tensor scores, Tensor? mask, bool causal, {_range('scores_')}, "
    f"{_range('probabilities_')}, int? window=None) -> Tensor",
    f"_quantized_softmax(Tensor scores, {_SOFTMAX}) -> (Tensor probabilities, Tensor statistics)",
    f"_quantized_softmax_backward(Tensor grad, Tensor scores, Tensor statistics, {_SOFTMAX}, "
    f"{_tensors(5)}",
    "quantized_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, "
    f"float scaling, {_range('scores_')}, {_range('probabilities_')}, int? window=None) -> Tensor",
    f"_quantized_attention(Tensor query, Tensor key, Tensor value, {_ATTENTION}) -> "
    "(Tensor context, Tensor statistics)",
    "_quantized_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    f"Tensor context, Tensor statistics, {_ATTENTION}, {_tensors(7)}",
    f"quantized_gelu(Tensor x, {_range('input_')}, {_range('output_')}) -> Tensor",
    f"_quantized_gelu({_GELU}) -> Tensor",
    f"_quantized_gelu_backward(Tensor grad, {_GELU}, {_tensors(5)}",
    f"quantized_cross_entropy(Tensor logits, Tensor labels, int ignore_index, {_range()}, "
    "int? classes=None) -> Tensor",
    f"_quantized_cross_entropy(Tensor logits, Tensor labels, {_quantizer()}, int? classes, "
    "int ignore_index) -> (Tensor losses, Tensor statistics)",
    "_quantized_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, "
    f"Tensor statistics, {_quantizer()}, int? classes, int ignore_index, {_tensors(3)}",
    "quantized_kl_div(Tensor logits, Tensor teacher_logits, Tensor? labels, float temperature, "
    f"int ignore_index, {_range()}, int? classes=None) -> Tensor",
    f"_quantized_kl_div(Tensor logits, Tensor teacher_logits, Tensor? labels, {_quantizer()}, "
    "float temperature, int? classes, int ignore_index) -> (Tensor losses, Tensor statistics)",
    "_quantized_kl_div_backward(Tensor grad, Tensor logits, Tensor teacher_logits, "
    f"Tensor? labels, Tensor statistics, {_quantizer()}, float temperature, int? classes, "
    f"int ignore_index, {_tensors(3)}",
    f"quantized_rms_norm(Tensor x, Tensor weight, float eps, {_range('output_')}) -> Tensor",
    f"_quantized_rms_norm(Tensor x, Tensor weight, float eps, {_quantizer('output_')}) -> "
    "(Tensor normalized, Tensor statistics)",
    "_quantized_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics, "
    f"{_quantizer('output_')}, {_tensors(4)}",
    f"quantized_glu(Tensor gate, Tensor up, str activation, {_range('gate_')}, "
    f"{_range('activation_')}, {_range('up_')}, {_range('product_')}) -> Tensor",
    f"_quantized_glu({_GLU}) -> Tensor",
    f"_quantized_glu_backward(Tensor grad, {_GLU}, {_tensors(10)}",
)
