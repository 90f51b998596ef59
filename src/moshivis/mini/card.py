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

A sixth version: of 300 fresh questions it answers 94 % in writing, 76 % spoken in voices of its training and 53 % in a
voice kept out of it; goals are 95 %, 90 % and 75 %. Reading: 87, 77 and 63 % (goals 90, 85, 65). Descriptions reach
0.87, 0.57 and 0.48 of the CIDEr-D of the grammar's own (goals 0.85 and 0.8). Knowledge: 91, 88 and 33 % (goals 90 and
85). Questions about pictures: 94 % right in its own drawings, 90 % as librsvg paints the same scenes, 92 % on simulated
photos of a print. A recogniser trained on the assistant's original voice errs in 21 % of the words that it speaks (goal
10), and in 11 % of those of held-out originals. It greets first in all conversations and reacts within 200 to 800 ms in
99 % of turns. Interrupted, it falls silent in all cases, and answers what it is then asked rightly in 67 % (43 % in the
unheard voice). `python -m moshivis.mini measure` prints these figures.

Spoken, it is weak at counting, yes/no and places, and long answers end wrongly; in writing, at what is not there when
something like it is, and at counting by size.

It was not made in one go. The speech LM was trained in six sittings: 3,250, 6,000, 4,000 and 5,000 steps with earlier
versions of recipe and world, 5,000 with all but the present answers, then 1,300 with these, as the code has it now but
for the rates (Muon and AdamW 8e-4, 100 steps of warm-up), 18 spoken rows and 0.3 of speaking turns. The image encoder
took 6,000 steps from its earlier weights. Adapters took 1,800 steps from nothing by the preset `mini`, 1,400 with a
rate of 1.5e-3 and `loss.speech` 1.5, and, on the present speech LM, 3,600 with 1.5e-3 and 2. After that the depth
transformer alone took about 1,700 steps of 8 spoken rows, all speaking, without pictures (AdamW 7e-4), and the listener
about 6,400 on the present answers (AdamW 8e-4). The codec is that of the fourth version.
"""
