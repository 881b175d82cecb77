"""The closed vocabulary: how an operator relates the gauges of its operands and of its result.

A value v may be stored as v' with ``v = a*v' + b`` (``equations``). An operator is described once, by one of these
kinds: ``relate`` says what must hold between the gauges around it and answers its result's; ``rewritten`` says what its
constants become, where it has any, once the gauges are known. Who else reads a value, and whether an edit is legal in
the graph, is the engine's. A slot is the name of an operand in the operator's schema, with an index for lists:
``"self"``, ``"tensors.2"``.

| kind | what it does | relation |
| --- | --- | --- |
| Scaling | multiplies and adds constants | it goes: a_y = s*a_x, b_y = s*b_x + t; it stays: none |
| Contraction, Recurrent, Lookup | linear in its data with a constant weight; rows of a table | none |
| Movement, Same | moves elements and changes none | elements keep their gauge |
| Average | a weighted mean along some axes | a_y = a_x, b_y = b_x |
| Sum | of two values | a_z = a_x = a_y, b_z = b_x + b_y |
| Product, Bilinear | of two values; a matrix product of two values | a_z = a_x*a_y, no b |
| Homogeneous | ReLU and its kin, maxima, a choice by a mask | a_y = a_x > 0, no b, or b_y = b_x |
| Normalised | normalises, then multiplies and adds constants | result free, operand pinned |
| ShapeOnly | reads nothing but the shape | none |
| Opaque | nothing passes | all pinned |
"""

from bnfold.semantics.base import Opaque, Rewritten, Semantics, Shape, ShapeOnly
from bnfold.semantics.contraction import Contraction, Geometry, Lookup, Recurrent
from bnfold.semantics.equations import Equations, Gauge
from bnfold.semantics.moving import Average, Movement, Same
from bnfold.semantics.pointwise import Bilinear, Homogeneous, Normalised, Product, Scaling, Sum

__all__ = [
    "Average",
    "Bilinear",
    "Contraction",
    "Equations",
    "Gauge",
    "Geometry",
    "Homogeneous",
    "Lookup",
    "Movement",
    "Normalised",
    "Opaque",
    "Product",
    "Recurrent",
    "Rewritten",
    "Same",
    "Scaling",
    "Semantics",
    "Shape",
    "ShapeOnly",
    "Sum",
]
