"""An ONNX graph under construction: nodes, and the constants that they use."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper


class Graph:
    """Nodes in the order of computation, and constants by name.

    Attributes:
      nodes: the nodes.
      constants: the constants.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node.

        Args:
          operator: type of the node, of the standard operators.
          *inputs: names of values.
          outputs: number of values that the operator returns.
          **attributes: attributes of the operator.

        Returns:
          Name of the first value that it returns.
        """
        names = [f"{operator}_{len(self.nodes)}"]
        names += [f"{names[0]}_{i}" for i in range(1, outputs)]
        node = helper.make_node(operator, inputs, names, name=names[0], **attributes)
        self.nodes.append(node)
        return names[0]

    def name(self, value: str, name: str) -> None:
        """Return a value from the program under a name of its own."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))

    def constant(self, array: np.ndarray | Sequence[int], name: str = "") -> str:
        """Add a constant.

        Args:
          array: its value.
          name: its name; "" for a number.

        Returns:
          Its name.
        """
        name = name or f"constant_{len(self.constants)}"
        assert name not in self.constants, name
        self.constants[name] = np.asarray(array, order="C")
        return name

    def half(self, array: np.ndarray, name: str) -> str:
        """Add a float32 constant that the file keeps in float16; return its float32 value."""
        stored = self.constant(array.astype(np.float16), name)
        return self.add("Cast", stored, to=onnx.TensorProto.FLOAT)

    def reshape(self, value: str, *shape: int) -> str:
        """Reshape a value; one length may be -1."""
        return self.add("Reshape", value, self.constant(np.array(shape, np.int64)))

    def transpose(self, value: str, *order: int) -> str:
        """Permute the axes of a value."""
        return self.add("Transpose", value, perm=order)

    def take(self, value: str, indices: np.ndarray, axis: int, length: int) -> str:
        """Take entries of an axis; nothing is added where these are all, in order.

        Args:
          value: name of the value.
          indices: numbers of the entries, of any shape.
          axis: the axis.
          length: its length.

        Returns:
          Name of the result.
        """
        if np.array_equal(indices, np.arange(length)):
            return value
        return self.add("Gather", value, self.constant(indices.astype(np.int64)), axis=axis)

    def sum(self, value: str, axis: int) -> str:
        """Sum along an axis, which is kept with length 1."""
        return self.add(
            "ReduceSum", value, self.constant(np.array([axis], np.int64)), keepdims=1
        )
