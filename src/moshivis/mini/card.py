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
small sums, opposites, week days, capitals, some small talk. It reads printed words and numbers badly. Photos of prints
of its drawings, simulated, were among its pictures; other photographs were not.

A fourth version: of 300 fresh questions it answers 80 % in writing, 63 % spoken in voices of its training and 39 % in
a voice kept out of it; goals are 95 %, 90 % and 75 %. Reading: 30, 18 and 15 % (goals 90, 85, 65). Descriptions reach
0.72, 0.34 and 0.26 of the CIDEr-D of the grammar's own (goals 0.85 and 0.8). Knowledge: 100, 61 and 15 % (goals 90 and
85). Questions about pictures: 74 % right in its own drawings, 72 % as librsvg paints the same scenes, 69 % on simulated
photos of a print. A recogniser trained on the assistant's original voice errs in 17 % of the words that it speaks (goal
10), and in 13 % of those of held-out originals. It reacts within 200 to 800 ms in 99 % of turns. Interrupted, it falls
silent in all cases, but answers what it is then asked rightly in 8 %. Shown a picture, it greets first in 21 of 24
conversations; in the others it waits to be spoken to.
The speech LM was trained in four sittings: 3,250, 6,000 and 4,000 steps with earlier versions of recipe and world, then
5,000 from those weights, its vocabulary mapped piece by piece, as the code has it now but for the rates (Muon and AdamW
8e-4, 300 steps of warm-up). Image encoder and the codec's decoder went on from
their earlier weights, too; adapters took 2,000 steps from nothing, with `loss.speech` 1
where the preset `mini` has 3 now.
`python -m moshivis.mini measure` prints these figures, that of the greetings apart.
"""
