"""Curation of an owner's documents: de-identify, filter, deduplicate, decontaminate, with an account of every row.

    curate      the whole of it (curation)
    Settings    what it does (settings)

Reading order: settings, identifiers (what is looked for), characters and pieces (in what), deidentify, words, quality,
duplicates, contamination, rows (the steps that look at one row), workers, spool, account, curation.
"""
