"""The closed vocabulary: how an operator relates the gauges of its operands and of its result.

A value v may be stored as v' with ``v = a*v' + b`` (``equations``). An operator is described once, by one of these
kinds: ``relate`` says what must hold between the gauges around it and answers its result's; ``rewritten`` says what its
constants become, where it has any, once the gauges are known. Who else reads a value, and whether an edit is legal in
the graph, is the engine's. A slot is the name of an operand in the operator's schema, with an index for lists:
``"self"``, ``"tensors.2"``.

| kind | what it does | relation |
| --- | --- | --- |
| Scaling | multiplies and adds constants | it goes: a_y = s*a_x, b_y = s*b_x + t; it stays: none |
| Contraction, Recurrent | linear in its data with a constant weight | none |
| Movement, Same | moves elements and changes none | elements keep their gauge |
| Average | a weighted mean along some axes | a_y = a_x, b_y = b_x |
| Sum | of two values | a_z = a_x = a_y, b_z = b_x + b_y |
| Product | of two values, or a matrix product of two | a_z = a_x*a_y, no b |
| Homogeneous | ReLU and its kin, maxima, a choice by a mask | a_y = a_x > 0, no b, or b_y = b_x |
| Normalised | normalises, then multiplies and adds constants; rows of a table | result free, operand pinned |
| ShapeOnly | reads nothing but the shape | none |
| Opaque | nothing passes | all pinned |
"""

from bnfold.semantics.base import Opaque, Rewritten, Semantics, Shape, ShapeOnly
from bnfold.semantics.contraction import Contraction, Geometry, Recurrent
from bnfold.semantics.equations import Equations, Gauge
from bnfold.semantics.moving import Average, Movement, Same
from bnfold.semantics.pointwise import Homogeneous, Normalised, Product, Scaling, Sum
