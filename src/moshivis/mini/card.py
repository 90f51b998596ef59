"""The model card that is saved with the miniature."""

CARD = """# moshivis mini

A miniature vision-speech model: it answers short spoken or written English questions about drawings of coloured
shapes, in speech, full duplex, on a two-core CPU. It is no general assistant; its vocabulary is about 240 words.

Made by `python -m moshivis.mini build` from nothing but pictures that a program draws, sentences that a grammar
writes and speech that text-to-speech programs speak (espeak-ng and flite for the user, festival's
cmu_us_slt_arctic_hts for the assistant). No recording of a person and no data set went into it.

Parts: a Mimi-like codec (12.5 Hz, 6 codebooks of 256 in use), a speech LM (width 256, 6 blocks, depth transformer of
width 128), a small SigLIP encoder, gated cross-attention in every block. Speech LM and encoder were frozen while the
adapters learnt from a mix of spoken and written samples.

It knows: colour, shape, size, number and place of shapes, yes/no and misleading questions about them, descriptions,
small sums, opposites, week days, capitals, some small talk. It cannot read words in pictures and was never trained on
photographs.

A third version: of 300 fresh questions it answers 81 % in writing, 55 % spoken in voices of its training and 22 % in
a voice kept out of it; goals are 85 % and 75 %. Its descriptions reach 0.77, 0.48 and 0.26 of the CIDEr-D of the
grammar's own. Questions about pictures: 75 % right in its own drawings, 74 % as librsvg paints the same scenes, 38 % on
simulated photos of a print. A recogniser trained on the assistant's original voice errs in 30 % of the words that it
speaks, and in 14 % of those of held-out originals. It cannot read: that came into the world after these weights.
The speech LM was trained in three sittings: 3,250 and 6,000 steps with earlier versions of the recipe, then 4,000 as
the code has it now but for gentler rates (Muon 5e-4, AdamW 6e-4, 200 steps of warm-up). The adapters took 2,000 steps.
`python -m moshivis.mini measure` prints these figures.
"""
