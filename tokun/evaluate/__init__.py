"""Every figure we publish: `python -m tokun.evaluate --checkpoint … --shards …/val-*.tar`. Each module measures one thing.

material   the held-out pairs of image shards that are measured      drawn      the model's own samples, stored on disk
figures    a value with its interval, and tables of them
features   pictures to vectors      distances   two sets of vectors      plots
doctor     the image tokenizer      images      samples against held-out pictures; style: are they engravings?
recognition  what a judge fitted on described originals still recognises in a reconstruction
words      the captions             coherence   do picture and words fit each other?
viewer     sheets for human viewers, viewer_score  scores of their answers, eyes  the pairs they are shown
judges     other models' opinions   memorisation  are samples copies of training pictures?
"""
