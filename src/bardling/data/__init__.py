"""Text becomes tokens, tokens become batches.

`sources` finds documents, `tokenizer` turns them into ids, `prepare` writes them as a dataset folder that `shards` reads,
`order` says which window of tokens sample number i is, and `loader` makes batches of them. Import from the modules: this
package itself imports nothing, so that the command line stays quick.
"""
