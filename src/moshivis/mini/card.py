"""The model card that is saved with the miniature."""

CARD = """# moshivis mini

A miniature vision-speech model: it answers short spoken or written English questions about drawings of coloured
shapes, in speech, full duplex, on a two-core CPU. It is no general assistant; its vocabulary is about 290 words.

Made by `python -m moshivis.mini build` from nothing but pictures that a program draws, sentences that a grammar
writes and speech that text-to-speech programs speak (espeak-ng and flite for the user, festival's
cmu_us_slt_arctic_hts for the assistant). No recording of a person went into it, and no data set but the hand-written
digits that come with scikit-learn.

Parts: a Mimi-like codec (12.5 Hz, 6 codebooks of 256 in use), a speech LM (width 256, 6 blocks, depth transformer of
width 128), a small SigLIP encoder, gated cross-attention in every block. Speech LM and encoder were frozen while the
adapters learnt from a mix of spoken and written samples.

It knows: colour, shape, size, number and place of shapes, yes/no and misleading questions about them, descriptions,
printed words and numbers, small sums, opposites, week days, capitals, some small talk. Photos of prints of its
drawings, simulated, were among its pictures; other photographs were not.

An eleventh version: of 300 fresh questions it answers 95.7 % in writing, 87 % spoken in voices of its training and 60 %
in a voice kept out of it; goals are 95 %, 90 % and 75 %. Reading: 87, 82 and 67 % (goals 90, 85, 65). Descriptions
reach 0.87, 0.74 and 0.64 of the CIDEr-D of the grammar's own (goals 0.85 and 0.8); 93, 60 and 52 % of them are wholly
right. Knowledge: 88, 94 and 48 % (goals 90 and 85). Questions about pictures: 96 % right in its own drawings, 95 % as
librsvg paints the same scenes, 96 % on simulated photos of a print. A recogniser trained on the assistant's original
voice errs in 9.4 % of the words that it speaks (goal 10), and in 0.2 % of those of held-out originals. It greets first
in all conversations, and its first word is in the text stream within 200 to 800 ms in 97 % of turns; its sound follows
240 ms later. Interrupted, its words stop in all cases, and it answers what it is then asked rightly in 78 % (46 % in
the unheard voice). `python -m moshivis.mini measure` prints these figures. The same questions, judged alike, the tenth
version answered to 95.0, 82 and 57 %.

Spoken, it is weakest at places, counting and long descriptions. Asked for a colour and a shape that are both to be
seen, but not in one thing, it says in one of five cases that such a thing is there. Pictures wider or taller than 2:1
were not among those that it learnt from: on 3:1 it answers about 65 % rightly, where it is 98 % on squares. Of the
digits by hand it reads 64 %, and part of those that were shown are among those that it learnt from.

It was not made in one go. The speech LM was trained in eleven sittings: 3,250, 6,000, 4,000 and 5,000 steps with
earlier versions of recipe and world, 5,000 with all but the present answers, 1,300 with these, 4,000 with recitals in
speech, 2,600 with twice as many questions a voice, 3,300 with twice as many again and the assistant's words at an even
pace, 2,500 on 77,544 newly spoken clips with claims repeated, in the last 1,200 also in recitals, and 2,600 with
questions of shapes and colours seen apart, descriptions in recitals, and weights on verdicts, these from step 200 on
and in writing from 1,190; as the code has it now but for the rates (Muon 1e-3, AdamW 8e-4, 60 steps of warm-up) and 24
spoken and 16 written rows. Its older clips were heard in three takes. Before the last 15,000 the depth transformer had
learnt alone for about 1,700 steps. The image encoder took 6,000 steps from its earlier weights. Adapters took 1,800
steps from nothing by the preset `mini`, 1,400, 3,600 and 3,000 with rates of 1.5e-3 and 2e-3 and `loss.speech` 1.5 and
2 on earlier speech LMs, 1,600 more with `data.p_audio` 0.5, 2,000 with 1.5e-3, `loss.speech` 2 and the preset's share
of speech, 2,000 more of these on the ninth speech LM, 1,800 on the tenth, and 3,000 with the preset's `loss.speech` on
the present one. The listener took about 12,000 steps on the present answers, spoken with longer pauses, after its first
training, the last 1,500 with silence around them. The codec is that of the fourth version.
"""
