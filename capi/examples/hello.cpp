// The C++ interface: stream one request, and run two more beside it. Usage: hello_cpp MODEL
#include <minipaged.hpp>

#include <cstdlib>
#include <iostream>

int main(int argc, char **argv)
{
    if (argc != 2) {
        std::cerr << "usage: " << argv[0] << " MODEL\n";
        return 2;
    }
    try {
        minipaged::engine engine(argv[1]);
        minipaged::sampling greedy;
        greedy.temperature = 0;
        greedy.max_tokens = 32;

        minipaged::request first = engine.submit("Good morrow, my lord.", greedy);
        minipaged::request second = engine.submit(engine.tokenize("What news from the court?"), greedy);
        minipaged::request streamed = engine.submit("Where is the king?", greedy, [](const minipaged::chunk &chunk) {
            std::cout << chunk.text << std::flush;
            return true; // go on
        });
        for (minipaged::request *request : {&streamed, &first, &second}) {
            request->wait();
            if (request != &streamed)
                std::cout << "\n---\n" << request->text();
        }
        std::cout << "\n---\n" << engine.stats().num_generated_tokens << " tokens generated\n";
    } catch (const minipaged::error &error) {
        std::cerr << "hello: " << error.status_name() << ": " << error.what() << '\n';
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
