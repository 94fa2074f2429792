"""Every figure we publish: `python -m tokun.evaluate --checkpoint … --shards …/val-*.tar`. Each room measures one thing.

material   what is measured: held-out pairs of image shards          drawn      the model's own samples, kept on the disk
figures    a value with its spread, and how a table of them is printed and written
features   pictures to vectors      distances   two sets of vectors      plots
doctor     the image tokenizer      images      samples against held-out pictures; style: are they engravings?
recognition  what a judge fitted on described originals still finds in a reconstruction
words      the captions             coherence   do picture and words fit each other?
viewer     sheets for people's eyes, viewer_score  what their answers come to, eyes  which pairs they are shown
judges     other models' opinions   memorisation  are samples copies of training pictures?
"""
