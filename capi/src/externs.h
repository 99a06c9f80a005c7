/* The Python functions that the C side calls: cffi makes them of bindings/. All are void, because one that
 * raises, or an interpreter that cannot start, would return 0; outcomes go through mpx_reply. */

void mpy_create(void *engine, const char *model, const char *options, const char *extra, int32_t mode,
                mpx_reply *reply);
void mpy_close(void *engine, mpx_reply *reply);
void mpy_step(void *engine, mpx_reply *reply);
void mpy_model_info(void *engine, minipaged_model_info *info, mpx_reply *reply);
void mpy_stats(void *engine, minipaged_stats *stats, mpx_reply *reply);
void mpy_stats_json(void *engine, mpx_reply *reply);
void mpy_tokenize(void *engine, const char *text, size_t size, int32_t special, mpx_reply *reply);
void mpy_detokenize(void *engine, const int32_t *token_ids, size_t count, int32_t skip, mpx_reply *reply);
void mpy_chat_prompt(void *engine, const char *json, size_t size, mpx_reply *reply);
