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

A seventh version: of 300 fresh questions it answers 92 % in writing, 78 % spoken in voices of its training and 50 % in
a voice kept out of it; goals are 95 %, 90 % and 75 %. Reading: 88, 83 and 75 % (goals 90, 85, 65). Descriptions reach
0.87, 0.49 and 0.41 of the CIDEr-D of the grammar's own (goals 0.85 and 0.8). Knowledge: 97, 82 and 33 % (goals 90 and
85). Questions about pictures: 93 % right in its own drawings, 89 % as librsvg paints the same scenes, 91 % on simulated
photos of a print. A recogniser trained on the assistant's original voice errs in 8 % of the words that it speaks (goal
10), and in 0.2 % of those of held-out originals. It greets first in all conversations and reacts within 200 to 800 ms
in 98 % of turns. Interrupted, it falls silent in all cases, and answers what it is then asked rightly in 72 % (55 % in
the unheard voice). `python -m moshivis.mini measure` prints these figures.

Spoken, it is weak at counting, yes/no and places, and long descriptions go wrong; in writing, at counting, and "Who are
you?" is taken for a greeting.

It was not made in one go. The speech LM was trained in seven sittings: 3,250, 6,000, 4,000 and 5,000 steps with earlier
versions of recipe and world, 5,000 with all but the present answers, 1,300 with these, then 4,000 with recitals in
speech, as the code has it now but for the rates (Muon and AdamW 8e-4, 60 steps of warm-up) and 20 spoken and 20 written
rows. Before these 4,000 the depth transformer had learnt alone for about 1,700 steps. The image encoder took 6,000
steps from its earlier weights. Adapters took 1,800 steps from nothing by the preset `mini`, 1,400 and 3,600 with a rate
of 1.5e-3 and `loss.speech` 1.5 and 2 on earlier speech LMs, and, on the present one, 3,000 with 2e-3 and 2. The
listener took about 12,000 steps on the present answers after its first training, the last 1,500 with silence around
them. The codec is that of the fourth version.
"""
