"""Specialty experts: a frozen public anchor, one pack for each owner, their merge, and their exact removal.

Words. The *anchor* is a dense decoder trained on public text and then frozen; its hash H0 names it. An *owner* holds
a specialty's private text and a *slot*, the stable id of its expert in every layer's table (slot 0 is the anchor's own
FFN). A *pack* is all that an owner gives away: for each layer an expert FFN, a router row r and a bias b, and of each
stakeholder group that it was aligned with a low-rank *delta* of the expert, mixed in when the model is used. *Merging*
stacks packs by slot beside the anchor, without training. *Opting out* leaves one pack away again, bit for bit.

    z_TS = x_TD r_SD^T + b_S      r_0 = 0, b_0 = 0: the anchor is the zero from which experts are measured
    the K largest z among slots present, ties to the lower slot; softmax over the chosen; sum in slot order

Why removal is exact: logits come from one product over a table of fixed width, in which an absent slot keeps its
place; choosing comes before normalising, so an absent expert is in no sum; winners are added in slot order; and an
expert's product never depends on the rows of another. The construction starts from FlexOlmo (arXiv:2507.07024).

Reading order: pack, triage, merge, measure.
"""
