"""The closed vocabulary: what an operator does to an Affine.

An operator is described once, by one of these kinds, and both directions use the description:

- ``pull(out)``: the operator must emit ``out(y)`` in place of ``y``; answer what each operand must become instead,
  and which constants change.
- ``push(given)``: some operands arrive as ``u`` where ``given[slot](u)`` is meant; answer the Affine by which the
  output then differs, and which constants change.

The answers hold algebra only. Who else reads a value, and whether an edit is legal in the graph, is the engine's.
A slot is the name of an operand in the operator's schema, with an index for lists: ``"self"``, ``"tensors.2"``.

| kind | what it does |
| --- | --- |
| Scaling | multiplies and adds constants |
| Contraction, Lookup | linear in its data with a constant weight; rows of a constant table |
| Movement, Same | moves elements and changes none |
| Average | a weighted mean along some axes |
| Sum, Product, Bilinear | of two values; a matrix product of two values |
| Homogeneous | a positive scale passes: ReLU and its kin, maximum, a choice by a mask |
| Normalised | normalises, then multiplies and adds constants: an affine after it goes there |
| ShapeOnly | reads nothing but the shape |
| Opaque, Unknown, Refused | nothing passes |
"""

from bnfold.semantics.base import Answer, No, Opaque, Refused, Semantics, Shape, ShapeOnly, Unknown, Yes
from bnfold.semantics.contraction import Contraction, Geometry, Lookup
from bnfold.semantics.moving import Average, Movement, Same
from bnfold.semantics.pointwise import Bilinear, Homogeneous, Normalised, Product, Scaling, Sum

__all__ = [
    "Answer",
    "Average",
    "Bilinear",
    "Contraction",
    "Geometry",
    "Homogeneous",
    "Lookup",
    "Movement",
    "No",
    "Normalised",
    "Opaque",
    "Product",
    "Refused",
    "Same",
    "Scaling",
    "Semantics",
    "Shape",
    "ShapeOnly",
    "Sum",
    "Unknown",
    "Yes",
]
