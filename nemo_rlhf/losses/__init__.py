"""One pure loss a file: tensors and keywords in, the loss and sums of its metrics out.

Every loss is a sum over the selected tokens divided by a ``normalizer`` that the caller gives: the number of selected
tokens over all microbatches and data-parallel ranks. The gradient then does not depend on how a batch is cut.
"""
