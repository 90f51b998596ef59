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
printed words and numbers, small sums, opposites, week days, capitals, some small talk. Photos of prints of its
drawings, simulated, were among its pictures; other photographs were not.

A fifth version: of 300 fresh questions it answers 83 % in writing, 70 % spoken in voices of its training and 50 % in a
voice kept out of it; goals are 95 %, 90 % and 75 %. Reading: 83, 80 and 75 % (goals 90, 85, 65). Descriptions reach
0.88, 0.43 and 0.38 of the CIDEr-D of the grammar's own (goals 0.85 and 0.8). Knowledge: 88, 85 and 30 % (goals 90 and
85). Questions about pictures: 80 % right in its own drawings, 79 % as librsvg paints the same scenes, 79 % on simulated
photos of a print. A recogniser trained on the assistant's original voice errs in 15 % of the words that it speaks (goal
10), and in 13 % of those of held-out originals. It greets first in all conversations and reacts within 200 to 800 ms in
99 % of turns. Interrupted, it falls silent in all cases, and answers what it is then asked rightly in 70 % (45 % in the
unheard voice). `python -m moshivis.mini measure` prints these figures.

It is weak where a question names a thing by its place only, at counting, where what is asked about is not there, and at
the end of long spoken answers.

It was not made in one go. The speech LM was trained in five sittings: 3,250, 6,000, 4,000 and 5,000 steps with earlier
versions of recipe and world, then 5,000 from those weights, as the code has it now but for the rates (Muon and AdamW
8e-4, 300 steps of warm-up) and, in the last 3,100, a quarter of speaking turns. The image encoder took 6,000 steps from
its earlier weights. Adapters took 1,800 steps from nothing by the preset `mini`, then 1,400 with a rate of 1.5e-3 and
`loss.speech` 1.5; all but the last 1,000 had half as many questions for things that are not there. The codec is that of
the fourth version.
"""
