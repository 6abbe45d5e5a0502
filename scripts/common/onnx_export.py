"""A network in PyTorch as ONNX; its weights are stored in half precision where that loses nothing,
and its backbone computes in float16 if asked.
"""

import io
import json

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

TrainingMode = torch.onnx.TrainingMode
OPSET = 17  # onnxruntime reads it since 2022


def to_onnx(model, config, images):
    """A network as the bytes of an .onnx file.

    model: an ISCNet in evaluation mode on the CPU. config: a dict of plain values that the file
    keeps as metadata; used here are the names "input" and "output", "dim" of the descriptors,
    "size" ("fixed" or "dynamic") and "precision" ("fp32" or "fp16"). images: float32
    (n, 3, height, width), of the size that a fixed file takes.
    """
    input_axes = {0: "n"}
    if config["size"] == "dynamic":
        input_axes |= {2: "height", 3: "width"}
    store_half = config["precision"] == "fp32" and all(
        holds_exactly(value) for value in model.state_dict().values()
    )
    # Folded into the convolutions, BatchNorm would leave weights that half precision rounds.
    # onnxruntime folds it on loading.
    training = TrainingMode.PRESERVE if store_half else TrainingMode.EVAL
    buffer = io.BytesIO()
    # The exporter by torch.export takes a minute instead of a second, and does not end for dynamic
    # sizes with the padding of EfficientNets ("SAME"), which depends on them.
    torch.onnx.export(
        model,
        (images,),
        buffer,
        dynamo=False,
        opset_version=OPSET,
        training=training,
        input_names=[config["input"]],
        output_names=[config["output"]],
        dynamic_axes={config["input"]: input_axes, config["output"]: {0: "n"}},
    )
    exported = onnx.load_from_string(buffer.getvalue())
    exported.graph.output[0].type.tensor_type.shape.dim[1].dim_value = config["dim"]
    if config["precision"] == "fp16":
        exported = to_half(exported)
    if store_half:
        store_in_half(exported.graph)
    helper.set_model_props(exported, {"config": json.dumps(config)})
    onnx.checker.check_model(exported, full_check=True)
    return exported.SerializeToString()


def holds_exactly(tensor):
    """Whether half precision holds all numbers of a tensor; integers stay as they are."""
    return not tensor.is_floating_point() or torch.equal(tensor.half().to(tensor.dtype), tensor)


def store_in_half(graph):
    """Store the float32 weights in half precision, and cast them to float32 on loading."""
    casts = []
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT:
            continue
        name = weight.name
        single = numpy_helper.to_array(weight)
        half = single.astype(np.float16)
        if not np.array_equal(half, single):  # a constant of the exporter's
            continue
        weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(
            helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.cast", to=TensorProto.FLOAT)
        )
    nodes = casts + list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)


def to_half(exported):
    """The ONNX model with a backbone in float16; its input and output, pooling and head stay in
    float32.
    """
    exported = onnx.shape_inference.infer_shapes(exported)
    graph = exported.graph
    single = single_precision(graph)
    keep_crossing_types(graph, single)
    output_type = graph.output[0].type.tensor_type
    output_type.elem_type = TensorProto.UNDEFINED
    half = convert_float_to_float16(
        exported, keep_io_types=True, disable_shape_infer=True, node_block_list=single
    )
    half.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    OnnxModel.graph_topological_sort(half.graph)
    return half


def single_precision(graph):
    """Names of the nodes that stay in float32: those behind the backbone, and those that compute
    with sizes, since float16 would round large ones.
    """
    constants = {"", *(weight.name for weight in graph.initializer)}
    sizes = set()
    names = []
    for node in graph.node:
        inputs = set(node.input) - constants
        computes_size = bool(inputs) and inputs <= sizes
        if not inputs:
            constants.update(node.output)
        elif computes_size or node.op_type == "Shape":
            sizes.update(node.output)
        # A name without a slash is another name of equal weights.
        behind_backbone = node.name.startswith("/") and not node.name.startswith("/backbone/")
        if computes_size or behind_backbone:
            names.append(node.name)
    return names


def keep_crossing_types(graph, single):
    """Forget the types of all values but those that pass between float16 and float32.

    Around a float32 node the converter casts every value that it knows to be float, so values
    between two such nodes would be rounded.
    """
    from_single = set()
    for node in graph.node:
        if node.name in single:
            from_single.update(node.output)
    crossing = set()
    for node in graph.node:
        for name in node.input:
            if (name in from_single) != (node.name in single):
                crossing.add(name)
    known = [value for value in graph.value_info if value.name in crossing]
    del graph.value_info[:]
    graph.value_info.extend(known)
