"""Every figure we publish: `tokun evaluate --checkpoint … --shards …/val-*.tar`. Each module measures one thing.

held_out_pairs   of image shards, to be measured      stored_samples   the model's own samples, on disk
figures    a value with its interval, and tables of them
features   pictures to vectors      distances   two sets of vectors      plots
doctor     the image tokenizer      images      samples against held-out pictures; style: are they engravings?
recognition  what a judge fitted on described originals still recognises in a reconstruction
captions   of the samples           coherence   do picture and words fit each other?
viewer     sheets for human viewers, viewer_score  scores of their answers, viewer_pairs  the pairs they are shown
judges     other models' opinions   memorisation  are samples copies of training pictures?
"""
